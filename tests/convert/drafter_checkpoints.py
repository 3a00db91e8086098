"""Published drafters' folders, tiny and random, in the names and files their own programs write.

medusa   config.json, medusa_lm_head.pt: FasterDecoding/Medusa     (0.0.linear.weight, 0.1.weight)
hydra    config.json, hydra_lm_head.pt: zankner/Hydra              (hydra_mlp.0.0.linear.weight)
eagle    config.json, pytorch_model.bin: SafeAILab/EAGLE           (fc.weight, layers.0. ...)
eagle3   config.json, pytorch_model.bin: the same, and SpecForge's (midlayer. ..., d2t, t2d)
"""

import json

import numpy as np

from tests.convert import torch_files

H, V, LAYERS = 32, 61, 4
LAYER = {
    "hidden_size": H, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 70.0,
}  # fmt: skip


def random(shapes, seed=0):
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=shape).astype(np.float32) * 0.4 + ("norm" in name)
        for name, shape in shapes.items()
    }


def layer(prefix, width=H):
    shapes = {f"{prefix}.post_attention_layernorm.weight": (H,)}
    for name, rows in (("q", 32), ("k", 16), ("v", 16)):
        shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, width)
    shapes[f"{prefix}.self_attn.o_proj.weight"] = (H, 32)
    for name, shape in (("gate", (40, H)), ("up", (40, H)), ("down", (H, 40))):
        shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
    return shapes


def write(folder, state, config, file="pytorch_model.bin"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch_files.save(state, folder / file)
    return state


def medusa(folder, heads=3, blocks=1, prefix="", **changes):
    shapes = {}
    for i in range(heads):
        for block in range(blocks):
            shapes[f"{prefix}{i}.{block}.linear.weight"] = (H, H)
            shapes[f"{prefix}{i}.{block}.linear.bias"] = (H,)
        shapes[f"{prefix}{i}.{blocks}.weight"] = (V, H)
    config = {
        "medusa_num_heads": heads, "medusa_num_layers": blocks,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
    }  # fmt: skip
    return write(folder, random(shapes), {**config, **changes}, "medusa_lm_head.pt")


def hydra(folder, heads=2, blocks=1, plus=False, **changes):
    step, first = (2, 1) if plus else (1, 0)  # Hydra++ has dropout before every block
    shapes = {}
    for i in range(heads):
        for block in range(blocks):
            width = (i + 2) * H if block == 0 else H
            name = f"hydra_mlp.{i}.{first + step * block}"
            shapes |= {f"{name}.linear.weight": (H, width), f"{name}.linear.bias": (H,)}
            if block == 0:
                shapes |= {
                    f"{name}.res_connection.weight": (H, width),
                    f"{name}.res_connection.bias": (H,),
                }
        head = f"hydra_lm_head.{i}.1" if plus else f"hydra_lm_head.{i}"
        shapes |= {f"{head}.weight": (V, H), f"{head}.bias": (V,)}
    if plus:
        inner = "prefix_embeding_layer"  # as they spell it
        shapes |= layer(f"{inner}.layers.0")
        shapes |= {f"{inner}.layers.0.input_layernorm.weight": (H,), f"{inner}.norm.weight": (H,)}
        shapes |= {f"{inner}.embed_tokens.weight": (V, H)}
        shapes |= {f"{inner}.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    config = {
        "hydra_num_heads": heads, "hydra_num_layers": blocks, "grounded_heads": True,
        "hydra_head_arch": "prefix-mlp" if plus else "mlp",
    }  # fmt: skip
    return write(folder, random(shapes), {**config, **changes}, "hydra_lm_head.pt")


def eagle(folder, qkv_bias=False, fc_bias=True, **changes):
    shapes = {"embed_tokens.weight": (V, H), "fc.weight": (H, 2 * H), **layer("layers.0")}
    if fc_bias:
        shapes["fc.bias"] = (H,)
    if qkv_bias:
        for name, rows in (("q", 32), ("k", 16), ("v", 16)):
            shapes[f"layers.0.self_attn.{name}_proj.bias"] = (rows,)
    config = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu", "vocab_size": V,
        "architectures": ["LlamaForCausalLM"], **LAYER,
    }  # fmt: skip
    return write(folder, random(shapes), {**config, **changes})


def eagle3(folder, drafted=40, embedded=False, prefix="midlayer", **changes):
    shapes = {
        "fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (drafted, H),
        f"{prefix}.hidden_norm.weight": (H,), f"{prefix}.input_layernorm.weight": (H,),
        **layer(prefix, 2 * H),
    }  # fmt: skip
    if embedded:
        shapes["embed_tokens.weight"] = (V, H)
    state = random(shapes)
    kept = np.sort(np.random.default_rng(1).permutation(V)[:drafted])
    state["d2t"] = (kept - np.arange(drafted)).astype(np.int64)
    state["t2d"] = np.isin(np.arange(V), kept).astype(np.float32)
    config = {
        "model_type": "llama", "num_hidden_layers": 1, "vocab_size": V, "draft_vocab_size": drafted,
        "architectures": ["LlamaForCausalLMEagle3"], **LAYER,
    }  # fmt: skip
    return write(folder, state, {**config, **changes})


WRITERS = {
    "medusa": medusa,
    "hydra": hydra,
    "hydra++": lambda folder, **changes: hydra(folder, plus=True, **changes),
    "eagle": eagle,
    "eagle3": eagle3,
}
