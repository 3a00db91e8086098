"""Verbs and flags that do not exist: what was meant, and what mlx-lm's are called here.

A verb's own parser would answer with its whole usage, in which the one word that is wrong is lost.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence

from ..errors import OptionError
from ..machine import ranks

TOGETHER = ("generate", "chat", "serve", "verify", "bench")
"""Verbs that several processes can run as one, started by `mlx.launch`."""

EACH = ("train",)
"""Verbs of which every process takes a share and computes it with the whole model."""

_THEIRS = "use mlx_lm.{} itself; what it makes loads here"
MLX_LM_VERBS = {
    "lora": "mlx_lm.lora fine-tunes a model, whose adapters every verb takes with --adapter-path; "
    "`specstream train` trains streams for it",
    "fuse": "every verb takes adapters as they are, with --adapter-path; to merge them use mlx_lm.fuse",
    **{
        name: _THEIRS.format(name)
        for name in (
            "awq",
            "dwq",
            "dynamic_quant",
            "gptq",
            "evaluate",
            "perplexity",
            "manage",
            "share",
        )
    },
}
"""Verbs of mlx-lm that are none here, and what to do instead."""

_NOT_HERE = "is not supported; leave it out"
_TEMPLATE = "the tokenizer's own chat template is used; leave it out"
_BATCH = "every prompt is answered alone here; leave it out"
_TRAINING = "`specstream train` has a schedule of its own; leave it out, or see --preset"
MLX_LM_FLAGS = {
    "--trust-remote-code": "mlx-specstream never runs code that a model brings along; leave it out",
    "--draft-model": "generate, chat, serve and verify take it; leave it out here",
    "--num-draft-tokens": "verbs that decode take it; leave it out here",
    "--use-default-chat-template": _TEMPLATE,
    "--chat-template": "put the template into the model's folder as chat_template.jinja",
    "--chat-template-args": "generate takes such an object as --chat-template-config",
    "--chat-template-config": "only generate takes it",
    "--eos-token": "generate takes further ones as --extra-eos-token",
    "--pipeline": f"a model on several machines {_NOT_HERE}",
    "--quantize-activations": f"it {_NOT_HERE}",
    "-qa": f"it {_NOT_HERE}",
    "--dequantize": "mlx_lm.convert -d writes unquantised weights; convert what it makes",
    "-d": "mlx_lm.convert -d writes unquantised weights; convert what it makes",
    "--allowed-origins": "name each origin with --allowed-origin",
    "--prompt-cache-size": "prefixes are kept by size, see --prompt-cache-bytes",
    "--prompt-concurrency": "one limit holds for prompts and answers, see --decode-concurrency",
    "--prompt-tokens": "prompts are real ones here, see --prompts",
    "-p": "prompts are real ones here, see --prompts",
    "--generation-tokens": "the most tokens of an answer are --max-tokens",
    "-g": "the most tokens of an answer are --max-tokens",
    "--num-trials": "how often each is measured is --repeats",
    "-n": "how often each is measured is --repeats",
    "--delay": f"it {_NOT_HERE}",
    "-b": _BATCH,
    "--batch-size": _BATCH,
    "--fine-tune-type": "streams have two parts to train, see --part and --mode",
    "--optimizer": _TRAINING,
    "--config": _TRAINING,
    "-c": _TRAINING,
    "--clear-cache-threshold": _TRAINING,
    "--report-to": "a training log is written beside the streams; leave it out",
    "--project-name": "a training log is written beside the streams; leave it out",
    "--test": "compare answers with `specstream verify` afterwards; leave it out",
    "--test-batches": "compare answers with `specstream verify` afterwards; leave it out",
}
"""Flags that people type for mlx-lm, for verbs whose own parser has none of that name."""


def unknown_verb(verb: str, verbs: Iterable[str]) -> OptionError:
    """Return what to say of a verb that does not exist."""
    if (name := verb.lower().replace("-", "_")) in MLX_LM_VERBS:
        return OptionError(f"there is no verb {verb!r}: {MLX_LM_VERBS[name]}.")
    return OptionError(f"there is no verb {verb!r}; {_meant(verb, verbs, 'specstream --help')}")


def check_flags(verb: str, words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Refuse the first flag that a verb's parser does not know.

    Raises:
        OptionError: names the flag that was meant, or what mlx-lm's is called here.
    """
    known = list(parser._option_string_actions)
    for word in words:
        if word == "--":
            return
        flag = word.partition("=")[0]
        if not flag.startswith("-") or flag in known:
            continue
        long = flag.startswith("--")
        if long and any(name.startswith(flag) for name in known):
            continue  # argparse takes an abbreviation, or says which it may be
        if flag in MLX_LM_FLAGS:
            raise OptionError(f"`specstream {verb}` has no {flag}: {MLX_LM_FLAGS[flag]}.")
        if long:
            meant = _meant(flag, known, f"specstream {verb} --help")
            raise OptionError(f"`specstream {verb}` has no {flag}; {meant}")


def _meant(word: str, known: Iterable[str], helping: str) -> str:
    close = difflib.get_close_matches(word.lower().replace("_", "-"), known, n=1, cutoff=0.6)
    shown = close[0] if close and close[0].startswith("-") else repr(close[0]) if close else ""
    return f"did you mean {shown}?" if close else f"`{helping}` lists what there is."


def join_the_others(verb: str) -> None:
    """Take this process's part of a verb that `mlx.launch` has started several times.

    Raises:
        OptionError: the verb runs in one process.
    """
    if not ranks.is_launched():
        return
    if verb in EACH:
        ranks.work_apart()
    elif verb not in TOGETHER:
        raise OptionError(
            f"specstream {verb} runs in one process: start it without mlx.launch, which is for "
            f"{', '.join((*TOGETHER, *EACH))}."
        )
    ranks.leave_talking_to_leader()
