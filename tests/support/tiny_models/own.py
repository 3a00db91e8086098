"""What a family's config says that the common table of sizes does not, or says otherwise."""

from __future__ import annotations

from tests.support.tiny_models.sizes import Config

FOUR_LAYERS = ["sliding_attention", "full_attention"] * 2
SLIDING = {"layer_types": FOUR_LAYERS}
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
    "gemma3n": {"text_config": {}},
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

# Models of text and pictures: the family of their text model.
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
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_text",
}
# Those of them whose text model takes its RoPE from elsewhere.
WITHOUT_ROPE_PARAMETERS = ("gemma3", "gemma4", "kimi_k25", "kimi_vl")

# Models of a family that differ from its tiny one in what their layers do.
VARIANTS: dict[str, dict[str, Config]] = {
    "gemma4_text": {
        "26B-A4B": {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
        "31B": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "E2B, E4B": {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 12,
            "num_kv_shared_layers": 2,
        },
    }
}
