"""Families whose refusal needs better words than the exception that they would raise."""

from __future__ import annotations

_POSITIONS = "it adds learned position embeddings before its layers, the same way for all rows"
_ONE_OFFSET = "it rotates by a function of its own that takes one position for all rows"
_CACHES = "its layers keep several caches each"
STATES_ALONE = "it has no attention layers, only states that every token overwrites"
_STATES = "its layers' states cannot be kept after every row of a draft"
_SHARED = "its upper layers use the keys and values of lower ones, which streams do not have"

REFUSED: dict[str, str] = {
    "afm7": _SHARED,
    "baichuan_m1": f"{_CACHES}, one of them a convolution's",
    "bailing_hybrid": _STATES,
    "bailing_moe_linear": _STATES,
    "deepseek_v32": f"{_CACHES}, to attend to few keys only",
    "deepseek_v41": "its layers have several hidden states each and share an index of keys",
    "falcon_h1": f"{_CACHES}, one of them a state that every token overwrites",
    "gemma3n": f"it has four hidden states side by side, and {_SHARED}",
    "glm_moe_dsa": f"{_CACHES}, to attend to few keys only",
    "gpt2": _POSITIONS,
    "gpt_bigcode": _POSITIONS,
    "jamba": _STATES,
    "llama4": "it attends in chunks, whose cache drops rows for good",
    "longcat_flash": _CACHES,
    "longcat_flash_ngram": f"{_CACHES}, and its embeddings depend on the tokens before",
    "mamba": STATES_ALONE,
    "mamba2": STATES_ALONE,
    "minimax_m3_vl": f"{_CACHES}, to attend to few keys only",
    "muse_spark": "each layer begins the next one's work",
    "nanochat": _ONE_OFFSET,
    "nemotron_h": _STATES,
    "olmo": "its code needs another package, and ends the program where that is missing",
    "olmo_hybrid": _STATES,
    "phi3small": "its head blanks fixed places of the vocabulary",
    "plamo2": _STATES,
    "recurrent_gemma": _STATES,
    "rwkv7": STATES_ALONE,
    "talkie": _ONE_OFFSET,
}
