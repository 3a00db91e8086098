"""A tiny random model of any family of mlx-lm, made by mlx-lm's own class.

One table of sizes serves all families, by the names their configs use; where a family needs other
words, it has a line in `OWN`. Windows are 5 tokens wide, so that a text of 30 is far beyond them.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..errors import ModelError

Config = dict[str, Any]

WINDOW = 5
MOST_PARAMETERS = 2_000_000
FOUR_LAYERS = ["sliding_attention", "full_attention"] * 2
SIZES: Config = {
    # the usual words, and the words of the odd ones
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 12,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": True,
    "partial_rotary_factor": 0.5,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "sliding_window_pattern": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "n_embd": 32,
    "n_layer": 4,
    "num_layers": 4,
    "n_head": 4,
    "n_kv_heads": 2,
    "n_positions": 512,
    "n_ctx": 512,
    "n_inner": 48,
    "rotary_dim": 8,
    "hidden_act": "silu",
    "model_max_length": 512,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "share_expert_dim": 24,
    "intermediate_size_mlp": 48,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "mlp_only_layers": [],
    "n_group": 1,
    "topk_group": 1,
    "use_qk_norm": True,
    "qk_norm": True,
    "post_norm": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # multipliers
    "logits_scaling": 3.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "scale_emb": 3.0,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 8.0,
    "query_pre_attn_scalar": 8,
    # recurrent layers
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv1d_width": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_d_ssm": 32,
    "mamba_d_head": 8,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_expand": 2,
    "n_groups": 1,
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_rank": 4,
    "time_step_limit": [0.0, 100.0],
}
SLIDING = {"layer_types": FOUR_LAYERS}
TEXT = "text_config"
YARN: Config = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
OWN: dict[str, Config] = {
    "afm7": {"hidden_dim": 32, "num_heads": 4, "num_kv_heads": 2, "num_kv_reuse_layers": 2},
    "afmoe": SLIDING,
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "minicpm": {"tie_word_embeddings": False},
    "seed_oss": {"tie_word_embeddings": False},
    "lille-130m": {"block_size": 512, "layer_norm_eps": 1e-5},
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": 1.0,
            "long_factor": 2.0,
        }
    },
    "glm4_moe": {"rope_scaling": None},
    "mellum": {
        **SLIDING,
        "rope_parameters": {
            kind: {"rope_theta": 10000.0, "rope_type": "default"}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "plamo": {"n_shared_head": 2},
    "deepseek": {"num_key_value_heads": 4},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": {**SLIDING, "is_moe_layer": [False, True, True, True]},
    "gear": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
    "gemma3n": {TEXT: {}},
    "gemma4_text": {
        "layer_types": FOUR_LAYERS,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "use_double_wide_mlp": False,
        "rope_parameters": None,
    },
    "glm4_moe_lite": {"rope_parameters": None},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": SLIDING,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
    },
    "hunyuan": {
        "use_mixed_mlp_moe": False,
        "use_cla": False,
        "cla_share_factor": 1,
        "rope_scaling": {"alpha": 2.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 2.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "q_lora_rank": None,
    },
    "laguna": SLIDING,
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 48,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "use_expert_bias": True},
    "llama": SLIDING,
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "ministral3": {
        **SLIDING,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    },
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    },
    "muse_glimmer": SLIDING,
    "nemotron": {"hidden_act": "relu2"},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "M", "-"]},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"no_op": number == 1, "n_heads_in_group": 2},
                "ffn": {"ffn_mult": 1.0},
            }
            for number in range(4)
        ]
    },
    "olmo3": SLIDING,
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {
        "num_transformer_layers": 4,
        "model_dim": 32,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.0] * 4,
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 20.0,
    },
    "phimoe": {
        "rope_scaling": {
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        }
    },
    "phixtral": {"model_dim": 32, "num_vocab": 12, "num_heads": 4, "rotary_dim": 4},
    "plamo2": {"hidden_size_per_head": 8, "full_attention_idx": [1, 3], "mamba_step": 2},
    "qwen": {"kv_channels": 8},
    "qwen2_moe": {"num_key_value_heads": 4},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "block_types": ["recurrent", "attention"]},
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "layer_types": None},
    "spark2_5": {**SLIDING, "rope_parameters": None},
    "step3p5": {**SLIDING, "num_attention_groups": 2, "moe_layers_enum": "1,2,3"},
    "talkie": {"num_key_value_heads": 4},
}
# Models of text and pictures: their text model's family.
WRAPPED = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "llama",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
}
RUN_BY_IMPORT = ("olmo",)  # ends the program where another package is missing


def family_modules() -> list[str]:
    """Return the names of mlx-lm's model modules that hold a model, sorted.

    `RUN_BY_IMPORT` is named without being imported.
    """
    import mlx_lm.models

    names = sorted(info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if name in RUN_BY_IMPORT or _has_model(name)]


def _has_model(name: str) -> bool:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    return hasattr(module, "Model") and hasattr(module, "ModelArgs")


def tiny_config(name: str, **overrides: Any) -> Config:
    """Return the config of a tiny model of a family, by the name of its mlx-lm module."""
    if name in WRAPPED:
        inner = tiny_config(WRAPPED[name], **overrides) if WRAPPED[name] != name else {}
        inner = inner or {**SIZES, "model_type": "qwen3_5_text", **overrides}
        inner["rope_parameters"] = {**SIZES["rope_parameters"], "partial_rotary_factor": 0.5}
        if name in ("gemma3", "gemma4", "kimi_vl", "kimi_k25"):
            inner["rope_parameters"] = None
        if name == "qwen3_5":  # experts belong to qwen3_5_moe
            inner["num_experts"] = 0
        return {"model_type": name, TEXT: inner, "vocab_size": SIZES["vocab_size"]}
    own = dict(OWN.get(name, {}))
    return {**SIZES, "model_type": name, **own, **overrides}


def tiny_random_model(name: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a float32 model of a family with weights that depend on `seed` alone.

    Norms are not one, biases not zero, and logits spread over several units.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = tiny_config(name, **overrides)
    if dataclasses.is_dataclass(module.ModelArgs):
        names = {field.name for field in dataclasses.fields(module.ModelArgs)}
        config = {key: value for key, value in config.items() if key in names}
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    flat: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    size = sum(array.size for _, array in flat)
    if size > MOST_PARAMETERS:
        raise ModelError(f"the table of sizes makes no tiny {name}: {size:,} parameters.")
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights of a model anew; the global random state is left as it was."""
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))

    def drawn(path: str, old: mx.array) -> mx.array:
        noise = mx.random.normal(old.shape, key=next(keys))
        if "norm" in path:
            return 1 + 0.2 * noise
        if old.ndim == 1:
            return 0.2 * noise
        return noise / old.shape[-1] ** 0.5 * (2.0 if "embed" in path or "head" in path else 1.0)

    model.update(tree_map_with_path(drawn, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
