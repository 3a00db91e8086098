"""mlx-lm doing the turns of a scene on its own cache.

What is reused is what can be reused without changing what comes out: for caches whose rows do not
depend on how a text is divided into passes, nothing at all, for then every turn must equal a fresh
start. For the others (see `KVCache.depends_on_passes`) mlx-lm goes on on its cache, trims it where
it can, and begins anew where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
    trim_prompt_cache,
)

from mlx_specstream.model.cache import KVCache, RotatingLayer
from tests.support.exactness.choices import Processor
from tests.support.exactness.draw import Scene


@dataclass
class Reference:
    """mlx-lm's model, cache and options; `caches` hold the text of the last turn, all of it.

    places: of the layers' caches in mlx-lm's list, None for a layer without one.
    """

    scene: Scene
    model: nn.Module
    kind: KVCache
    places: Sequence[int | None]
    caches: list[Any] = field(default_factory=list)

    def begin(self, text: Sequence[int], reused: int, goes_on: bool) -> list[int]:
        """Bring the cache to `reused` tokens of `text` and return what is left for the prompt.

        `goes_on`: the text begins with all that was said and answered before.
        """
        if not self.kind.depends_on_passes or reused == 0:
            self.caches = self._fresh()
            return list(text)
        if goes_on:
            return list(text[reused + 1 :])  # mlx-lm's cache has the last token as well
        if any(type(cache) is QuantizedKVCache for cache in self.caches) or not self._rotates():
            trim_prompt_cache(self.caches, self.caches[0].offset - reused)
        else:
            self.caches = self._fresh()
            list(self._generate(text[:reused], 0, []))
        return list(text[reused:])

    def answer(
        self, prompt: Sequence[int], tokens: int, processors: Sequence[Processor]
    ) -> tuple[list[int], list[mx.array]]:
        """Return the answer's tokens and the log-probabilities (V,) each was the likeliest of."""
        found, log_probs = [], []
        for token, values in self._generate(prompt, tokens, processors):
            found.append(int(token))
            log_probs.append(values)
        return found, log_probs

    def _generate(self, prompt: Sequence[int], tokens: int, processors: Sequence[Processor]) -> Any:
        config = self.scene.cache_config
        return generate_step(
            mx.array(list(prompt)),
            self.model,
            max_tokens=tokens,
            logits_processors=list(processors),
            prompt_cache=self.caches,
            prefill_step_size=self.scene.chunk,
            kv_bits=config.kv_bits,
            kv_group_size=config.kv_group_size,
            quantized_kv_start=config.quantized_kv_start,
        )

    def _rotates(self) -> bool:
        return any(isinstance(layer, RotatingLayer) for layer in self.kind.layers)

    def _fresh(self) -> list[Any]:
        """Return empty caches of mlx-lm of the same kind as ours, layer by layer."""
        made: list[Any] = make_prompt_cache(self.model)
        for place, layer in zip(self.places, self.kind.layers, strict=True):
            if isinstance(layer, RotatingLayer) and place is not None:
                made[place] = RotatingKVCache(max_size=layer.size, keep=layer.keep)
        return made
