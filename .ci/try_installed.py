"""Try an installed mlx-specstream as a user would: every verb's help, convert, chat, serve, its page, streams."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mlx_specstream
from mlx_specstream.cli import VERBS
from mlx_specstream.weights.shipped import SHIPPED, shipped_names

COMMAND = str(Path(sys.executable).with_name("specstream"))
WIDTH, VOCAB = 64, 256


def main() -> None:
    home = Path(mlx_specstream.__file__).parent
    assert "site-packages" in home.parts, f"tried {home}, which is no installation"
    assert shipped_names(), "no streams were shipped"
    for name in shipped_names():
        assert (SHIPPED / name / "model.safetensors").is_file() or any((SHIPPED / name).iterdir())
    specstream("--version")
    for verb in VERBS:
        specstream(verb, "--help")
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "made"
        write_model(source)
        specstream("convert", "--hf-path", str(source), "--mlx-path", str(made))
        assert (made / "config.json").is_file()
        words = ["--model", str(made), "--streams", "none", "--max-tokens", "4"]
        assert "tokens" in specstream("generate", *words, "--prompt", "abc", "--verbose", "T")
        specstream("chat", *words, text="abc\n")
        serve(made)
    print(f"installed, and it works: {home}")


def specstream(*words: str, text: str = "") -> str:
    """Run the installed command; return what it printed."""
    done = subprocess.run(
        [COMMAND, *words], input=text, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"specstream {' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def serve(model: Path) -> None:
    """Serve a model, read the page and ask it something."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", str(model), "--streams", "none", "--port", str(port)]
    server = subprocess.Popen([COMMAND, *words], stdout=subprocess.DEVNULL)
    try:
        page = answered(f"http://127.0.0.1:{port}/", server)
        assert "<html" in page.lower()
        (name, *_) = json.loads(answered(f"http://127.0.0.1:{port}/v1/models", server))["data"]
        asked = {"model": name["id"], "prompt": "abc", "max_tokens": 3}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            assert json.load(reply)["usage"]["completion_tokens"] == 3
    finally:
        server.terminate()
        server.wait(timeout=60)


def answered(url: str, server: subprocess.Popen[bytes]) -> str:
    """Return a page once the server is there."""
    until = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310
                return str(reply.read().decode())
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.2)


def write_model(folder: Path) -> None:
    """Write a tiny random model whose tokens are bytes."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH,
        "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


if __name__ == "__main__":
    os.environ["SPECSTREAM_PLAN_SECONDS"] = "0"
    main()
