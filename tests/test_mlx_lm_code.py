"""Code written for mlx-lm runs after changing the import: what people copy from its documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

# Each runs with `path` set to a model's folder, in an empty folder, and checks itself.
LOAD = "from mlx_lm import load\nmodel, tokenizer = load(path)\n"
IDS = LOAD + "import mlx.core as mx\nids = mx.array(tokenizer.encode('Hello'))\n"
CACHE = LOAD + "from mlx_lm import generate\nfrom mlx_lm.models.cache import make_prompt_cache\n"
SNIPPETS = {
    "generate": LOAD + "from mlx_lm import generate\n"
    "text = generate(model, tokenizer, prompt='Hello', verbose=True, max_tokens=6)\n"
    "assert isinstance(text, str)",
    "chat template": LOAD + "from mlx_lm import generate\n"
    "messages = [{'role': 'user', 'content': 'Hi'}]\n"
    "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)\n"
    "assert isinstance(generate(model, tokenizer, prompt=prompt, max_tokens=4), str)",
    "stream": LOAD + "from mlx_lm import stream_generate\n"
    "found = [r for r in stream_generate(model, tokenizer, 'Hi', max_tokens=5)]\n"
    "assert found[-1].generation_tokens <= 5 and found[-1].finish_reason in ('length', 'stop')\n"
    "assert found[0].prompt_tps > 0 and isinstance(found[0].text, str)",
    "from generate": "from mlx_lm.generate import stream_generate, generate\n"
    + LOAD
    + "assert isinstance(generate(model, tokenizer, 'Hi', max_tokens=3), str)",
    "generate_step": IDS + "from mlx_lm.generate import generate_step\n"
    "tokens = [t for t, _ in generate_step(ids, model, max_tokens=4)]\nassert len(tokens) == 4",
    "same tokens": IDS + "from mlx_lm import stream_generate\n"
    "from mlx_lm.generate import generate_step\n"
    "theirs = [int(t) for t, _ in generate_step(ids, model, max_tokens=6)]\n"
    "ours = [r.token for r in stream_generate(model, tokenizer, ids, max_tokens=6)]\n"
    "assert ours == theirs[: len(ours)]",
    "sampler": LOAD + "from mlx_lm import generate\nfrom mlx_lm.sample_utils import make_sampler\n"
    "sampler = make_sampler(temp=0.7, top_p=0.9, top_k=20)\n"
    "assert isinstance(generate(model, tokenizer, 'Hi', max_tokens=4, sampler=sampler), str)",
    "min_p": LOAD + "from mlx_lm import generate\nfrom mlx_lm.sample_utils import make_sampler\n"
    "generate(model, tokenizer, 'Hi', max_tokens=4, sampler=make_sampler(1.0, 0.0, 0.05, 1))",
    "greedy": LOAD + "from mlx_lm import generate\nfrom mlx_lm.sample_utils import make_sampler\n"
    "one = generate(model, tokenizer, 'Hi', max_tokens=4, sampler=make_sampler(temp=0.0))\n"
    "assert one == generate(model, tokenizer, 'Hi', max_tokens=4)",
    "processors": LOAD + "from mlx_lm import generate\n"
    "from mlx_lm.sample_utils import make_logits_processors\n"
    "found = make_logits_processors(repetition_penalty=1.2, repetition_context_size=8)\n"
    "generate(model, tokenizer, 'Hi', max_tokens=4, logits_processors=found)",
    "bias": LOAD + "from mlx_lm import stream_generate\n"
    "from mlx_lm.sample_utils import make_logits_processors\n"
    "found = make_logits_processors(logit_bias={65: 1e4})\n"
    "made = stream_generate(model, tokenizer, 'Hi', max_tokens=3, logits_processors=found)\n"
    "assert [r.token for r in made] == [65] * 3",
    "sampling function": "from mlx_lm.sample_utils import apply_top_p, categorical_sampling\n"
    "import mlx.core as mx\nassert categorical_sampling(mx.zeros((1, 4)), 1.0).shape == (1,)",
    "cache": CACHE + "cache = make_prompt_cache(model)\n"
    "generate(model, tokenizer, 'Hi', max_tokens=3, prompt_cache=cache)\n"
    "assert cache[0].offset > 2",
    "cache of a size": CACHE + "cache = make_prompt_cache(model, max_kv_size=64)\n"
    "generate(model, tokenizer, 'Hi', max_tokens=3, prompt_cache=cache)",
    "trim": CACHE + "from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache\n"
    "cache = make_prompt_cache(model)\n"
    "generate(model, tokenizer, 'Hi', max_tokens=3, prompt_cache=cache)\n"
    "assert can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 1) == 1",
    "save a cache": CACHE + "from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache\n"
    "cache = make_prompt_cache(model)\n"
    "generate(model, tokenizer, 'Hi', max_tokens=3, prompt_cache=cache)\n"
    "save_prompt_cache('cache.safetensors', cache)\n"
    "assert load_prompt_cache('cache.safetensors')[0].offset == cache[0].offset",
    "cache classes": "from mlx_lm.models.cache import KVCache, RotatingKVCache\n"
    "assert KVCache().offset == 0",
    "batch": LOAD + "from mlx_lm import batch_generate\n"
    "prompts = [tokenizer.encode(p) for p in ('Hello', 'Good day')]\n"
    "answers = batch_generate(model, tokenizer, prompts, max_tokens=4)\n"
    "assert len(answers.texts) == 2",
    "batch of generate": LOAD + "from mlx_lm.generate import batch_generate\n"
    "answers = batch_generate(model, tokenizer, [[72, 105]], max_tokens=[4], verbose=False)\n"
    "assert answers.stats.generation_tokens <= 4",
    "logits": IDS + "logits = model(ids[None])\nassert logits.shape[:2] == (1, ids.size)",
    "logits with a cache": IDS + "from mlx_lm.models.cache import make_prompt_cache\n"
    "cache = make_prompt_cache(model)\n"
    "model(ids[None], cache=cache)\nassert cache[0].offset == ids.size",
    "parameters": LOAD + "from mlx.utils import tree_flatten\n"
    "assert tree_flatten(model.parameters()) and model.args.vocab_size == 256\nmodel.eval()",
    "load of utils": "from mlx_lm.utils import load\n"
    "model, tokenizer, config = load(path, return_config=True)\n"
    "assert config['model_type'] == 'llama'",
    "utilities": LOAD + "from mlx_lm.utils import compute_bits_per_weight, get_total_parameters\n"
    "assert get_total_parameters(model) > 0 and compute_bits_per_weight(model) == 32",
    "convert": "from mlx_lm import convert, load\nconvert(path, mlx_path='made')\nload('made')",
    "convert to 4 bits": "from mlx_lm.convert import convert\n"
    "convert(hf_path=path, mlx_path='four', quantize=True, q_bits=4, q_group_size=32)\n"
    "import json, pathlib\n"
    "assert json.loads(pathlib.Path('four/config.json').read_text())['quantization']['bits'] == 4",
    "the module's own": "import mlx_lm\nmodel, tokenizer = mlx_lm.load(path)\n"
    "mlx_lm.convert(path, 'here', dtype='float16')\n"
    "assert isinstance(mlx_lm.generate(model, tokenizer, 'Hi', max_tokens=2), str)",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_code_for_mlx_lm_runs_with_the_import_changed(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = SNIPPETS[name].replace("mlx_lm", "mlx_specstream")
    exec(compile(source, name, "exec"), {"path": str(tiny_folder)})
