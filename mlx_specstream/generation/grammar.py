"""Answers that fit a JSON schema, a regular expression or a grammar, through llguidance.

    grammar = Grammar.json_schema(tokenizer, {"type": "object", ...}, model.backbone.vocab_size)
    generate(model, tokenizer, prompt, logits_processors=[grammar.processor()])

A `GrammarProcessor` is a logits processor: it sets to -inf the tokens that the grammar does not
allow after the answer so far, and works so in mlx-lm too. On a draft tree every row gets the
mask of the grammar's state after its own ancestors, so the text is that of plain constrained
decoding; a draft that violates the grammar is never drawn, hence never accepted.

The masks are made on the host, which must know the draft: that is a second synchronisation per
step, taken while the device runs the model over the tree. After the grammar's end only tokens
that end the answer are allowed.

llguidance is an extra: `pip install "mlx-specstream[grammar]"`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from ..errors import DataError, OptionError, brief
from ..loading.tokenizer import spelling_of
from ..speculation.result import to_ints
from ..speculation.sampling import NodeProcessor
from ..speculation.tree import DraftTree
from .json_schema import schema_text

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_BITS = 32  # of a mask's words
# Making llguidance's view of a tokenizer takes about a second for a large vocabulary.
_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


class Grammar:
    """A grammar compiled for one model's vocabulary; make it once, use it for any number of answers.

    Args:
        source: what llguidance's `grammar_from_...` functions return.
        vocab_size: the number of logits, which may be more than the tokenizer's tokens.

    Raises:
        DataError: the grammar has a mistake or a part that llguidance does not support.
        OptionError: llguidance is not installed, or does not know the tokenizer's kind.
    """

    def __init__(self, tokenizer: TokenizerWrapper, source: str, vocab_size: int) -> None:
        self.vocab_size, self.source = vocab_size, source
        self.end_tokens = frozenset(int(token) for token in tokenizer.eos_token_ids)
        matcher = _llguidance().LLMatcher(_vocabulary(tokenizer, vocab_size), source, log_level=0)
        if matcher.is_error():
            raise DataError(f"the grammar cannot be used: {_reason(matcher)}.")
        # Some turn out too large only when their first token is asked for, or the first choice.
        first = matcher.deep_copy()
        first.compute_bitmask()
        if not first.is_error() and (forced := first.compute_ff_tokens()):
            first.consume_tokens(forced)
            first.compute_bitmask()
        if first.is_error():
            raise _too_complex(first)
        self._matcher = matcher

    @classmethod
    def json_schema(
        cls, tokenizer: TokenizerWrapper, schema: Mapping[str, Any] | bool | str, vocab_size: int
    ) -> Grammar:
        """Return the grammar of the JSON texts that fit a schema, given as an object or its text.

        `{"type": "object"}` allows any JSON object. The text is one line with a blank behind `:`
        and `,`, unless `x-guidance` in the schema says otherwise.
        """
        source = _llguidance().LLMatcher.grammar_from_json_schema(schema_text(schema))
        return cls(tokenizer, source, vocab_size)

    @classmethod
    def regex(cls, tokenizer: TokenizerWrapper, pattern: str, vocab_size: int) -> Grammar:
        """Return the grammar of the texts that a regular expression matches as a whole."""
        source = _llguidance().LLMatcher.grammar_from_regex(pattern)
        return cls(tokenizer, source, vocab_size)

    @classmethod
    def lark(cls, tokenizer: TokenizerWrapper, grammar: str, vocab_size: int) -> Grammar:
        """Return a context-free grammar written as Lark does, with `start` as its first rule."""
        source = _llguidance().LLMatcher.grammar_from_lark(grammar)
        return cls(tokenizer, source, vocab_size)

    def processor(self) -> GrammarProcessor:
        """Return the logits processor of one answer."""
        return GrammarProcessor(self)

    def matcher(self) -> Any:
        """Return a fresh matcher of llguidance's, at the grammar's start."""
        return self._matcher.deep_copy()


def lark_mark(tokenizer: TokenizerWrapper, mark: str, vocab_size: int) -> str:
    """Return a mark's text in Lark: special tokens by their numbers, for letters are not they.

    Which tokens are special llguidance decides, and not by the tokenizer's flag alone.
    """
    vocabulary = _vocabulary(tokenizer, vocab_size)
    parts, letters = [], b""
    for token in vocabulary.tokenize_str(mark, parse_special=True):
        if not vocabulary.is_special_token(token):
            letters += vocabulary.decode_bytes([token])
            continue
        parts += [json.dumps(letters.decode(), ensure_ascii=False)] if letters else []
        parts.append(f"<[{token}]>")
        letters = b""
    parts += [json.dumps(letters.decode(), ensure_ascii=False)] if letters else []
    return " ".join(parts)


class GrammarProcessor:
    """Allows in one answer what its grammar allows; `grammar.Grammar.processor` makes it.

    Where the answer begins is told by `begin`, else the first call's text is the prompt.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._start: int | None = None
        self._matcher = grammar.matcher()
        self._consumed: list[int] = []

    def begin(self, prompt_tokens: int) -> None:
        """Say that the answer begins after so many tokens."""
        self._start = prompt_tokens

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return logits (1, V) with -inf where the grammar forbids what follows `tokens` (n,).

        Raises:
            OptionError: the answer so far does not fit the grammar.
        """
        ended = self._go_to(to_ints(tokens))
        return _masked(logits, self._bits([ended]))

    def at_nodes(self, history: Sequence[int], tree: DraftTree) -> NodeProcessor:
        """Wait for the tree and return what masks the logits of its nodes.

        Raises:
            OptionError: the answer up to the root does not fit the grammar.
        """
        tokens, parents = to_ints(tree.tokens), to_ints(tree.parents)
        ended = self._go_to([*history, tokens[0]])
        bits = self._tree_bits(tokens, parents, ended)
        return lambda node, logits: _masked(logits, mx.take(bits, node, axis=0))

    def _go_to(self, text: list[int]) -> bool:
        """Bring the matcher to the end of `text`; tell whether the answer is over."""
        if self._start is None:
            self._start = len(text)
        answer = text[self._start :]
        over = next((i for i, t in enumerate(answer) if t in self.grammar.end_tokens), None)
        ended = over is not None
        answer = answer[:over]
        same = 0
        for old, new in zip(self._consumed, answer, strict=False):
            if old != new:
                break
            same += 1
        if same < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - same)
            del self._consumed[same:]
        taken = self._matcher.try_consume_tokens(answer[same:])
        self._consumed += answer[same : same + taken]
        if len(self._consumed) < len(answer):
            if self._matcher.is_error():
                raise _too_complex(self._matcher)
            raise OptionError(
                "the answer so far does not fit its grammar; give every answer a processor of its "
                "own, and no beginning that the grammar does not allow."
            )
        return ended

    def _tree_bits(self, tokens: list[int], parents: list[int], ended: bool) -> mx.array:
        """Return the masks of all nodes, (T, words) int32; the matcher is at the root.

        Nodes come after their parents, but not next to them: the matcher goes from one to the
        next by way of their last common ancestor. Behind a violation nothing is masked, for
        nothing there can be accepted.
        """
        import numpy as np

        masks = np.full((len(tokens), self._words), -1, dtype=np.int32)
        children: dict[int, list[int]] = {}
        for node in range(1, len(tokens)):
            children.setdefault(parents[node], []).append(node)

        def descend(node: int, over: bool) -> None:
            self._fill(masks, node, over)
            for child in children.get(node, ()):
                if over or tokens[child] in self.grammar.end_tokens:
                    descend(child, True)
                elif self._matcher.try_consume_tokens([tokens[child]]):
                    descend(child, False)
                    self._matcher.rollback(1)

        descend(0, ended)
        return mx.array(masks)

    def _bits(self, ends: list[bool]) -> mx.array:
        import numpy as np

        masks = np.full((len(ends), self._words), -1, dtype=np.int32)
        for row, ended in enumerate(ends):
            self._fill(masks, row, ended)
        return mx.array(masks)

    def _fill(self, masks: Any, row: int, ended: bool) -> None:
        """Put what the grammar allows now into a row of `masks` (n, words) int32."""
        if ended:
            masks[row] = 0
            for token in self.grammar.end_tokens:
                masks[row, token // _BITS] |= (
                    -(2**31) if token % _BITS == 31 else 1 << token % _BITS
                )
            return
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, masks, row)
        if self._matcher.is_error():
            raise _too_complex(self._matcher)

    @property
    def _words(self) -> int:
        return -(-self.grammar.vocab_size // _BITS)


def _masked(logits: mx.array, bits: mx.array) -> mx.array:
    """Return logits (1, V) with -inf where `bits` (1, words) int32 hold a zero."""
    allowed = (bits[0, :, None] >> mx.arange(_BITS, dtype=mx.int32)) & 1
    allowed = allowed.reshape(1, -1)[:, : logits.shape[-1]]
    return mx.where(allowed == 1, logits, mx.array(-mx.inf, dtype=logits.dtype))


def _vocabulary(tokenizer: TokenizerWrapper, vocab_size: int) -> Any:
    """Return llguidance's view of a tokenizer, made once.

    Raises:
        OptionError: it is no fast tokenizer, or the model has fewer logits than it has tokens.
    """
    made = _vocabularies.setdefault(tokenizer._tokenizer, {})
    ends = sorted(int(token) for token in tokenizer.eos_token_ids)
    key = (vocab_size, *ends)
    if key not in made:
        make: Callable[..., Any] = _llguidance().LLTokenizer
        text = tokenizer_text(tokenizer)
        if text is None:
            raise OptionError(
                "the model's tokenizer cannot be used with a grammar: it is no fast tokenizer."
            )
        try:
            made[key] = make(text, n_vocab=vocab_size, eos_token=ends)
        except Exception as error:  # llguidance raises what its parts raise
            raise OptionError(
                f"the model's tokenizer cannot be used with a grammar: {brief(error)}."
            ) from error
    return made[key]


def tokenizer_text(tokenizer: TokenizerWrapper) -> str | None:
    """Return a tokenizer as llguidance reads it, None of one that is not a fast one.

    Of SentencePiece's decoders llguidance knows one alone; others would keep ▁ for a blank.
    """
    from tokenizers import decoders

    backend: Any = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend = copy.copy(backend)
    backend.no_padding()
    backend.no_truncation()
    if spelling_of(tokenizer) == "sentencepiece":
        known = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
        backend.decoder = decoders.Sequence(list(known))
    text: str = backend.to_str()
    return text


def _llguidance() -> Any:
    """Return llguidance.

    Raises:
        OptionError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise OptionError(
            "answers by a grammar need the package llguidance, which is not installed; "
            'pip install "mlx-specstream[grammar]".'
        ) from None


def _too_complex(matcher: Any) -> DataError:
    if "NoExtensionBias" in matcher.get_error():
        return DataError(
            "the grammar cannot be used: nothing fits it, as when a schema or a rule refers to "
            "itself alone."
        )
    return DataError(
        f"the grammar is too complex for llguidance: {_reason(matcher)}; use a simpler one."
    )


def _reason(matcher: Any) -> str:
    """Return what llguidance says in a few words; of a regular expression it quotes first."""
    said = matcher.get_error()
    _, quoted, why = said.partition("\nerror: ")
    return f"invalid regular expression: {brief(why)}" if quoted else brief(said)
