"""What is opened, what is refused: links, indexes, hub repositories, name rules."""

import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from mlx_specstream.convert.hub import locate
from mlx_specstream.convert.names import fit_base, read_rules, sort_names
from mlx_specstream.convert.reader import open_checkpoint
from mlx_specstream.convert.tensors import Tensor, joined
from mlx_specstream.errors import CheckpointError, OptionError
from mlx_specstream.weights.tensorfile import TensorSpec, TensorWriter, cast_bits


def write_weights(path, *names):
    specs = [TensorSpec(name, "F32", (2,)) for name in names]
    with TensorWriter(path, specs) as writer:
        for spec in specs:
            writer.write(np.ones(spec.shape, np.float32))
    return path


def folder_with(tmp_path, **files):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, names in files.items():
        write_weights(folder / f"{name}.safetensors", *names)
    return folder


def test_links_that_leave_the_folder_are_refused(tmp_path):
    outside = write_weights(tmp_path / "outside.safetensors", "a")
    folder = folder_with(tmp_path)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leaves"):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    write_weights(folder / "real.safetensors", "a")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="link that leaves"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="link that leaves"):
        open_checkpoint(folder)


def test_a_hub_cache_with_its_links_is_read(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    write_weights(repository / "blobs" / "xyz", "a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/xyz")
    assert list(open_checkpoint(snapshot).tensors) == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        3,
        "missing.safetensors",
        "a\0b",
        "x" * 5000,
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, name):
    folder = folder_with(tmp_path, x=["a"])
    write_weights(tmp_path / "x.safetensors", "a")
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_an_index_must_agree_with_its_files(tmp_path):
    folder = folder_with(tmp_path, x=["a"], y=["b"])
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not hold 'b'"):
        open_checkpoint(folder)
    index["weight_map"]["b"] = "y.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(folder).tensors) == {"a", "b"}


def test_a_tensor_in_two_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is in both"):
        open_checkpoint(folder_with(tmp_path, x=["a"], y=["a"]))


def test_trainers_leftovers_are_no_weights(tmp_path):
    folder = folder_with(tmp_path, model=["a"], optimizer=["m"], streams=["s"])
    (folder / "training_args.bin").write_bytes(b"pickled arguments")
    assert set(open_checkpoint(folder).tensors) == {"a"}


# ---- rules -------------------------------------------------------------------------------------


def source(name, shape=(2,), dtype="F32", tmp="x.bin"):
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Tensor.in_file(name, dtype, shape, Path(tmp), lambda: value)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("stream_embeddings.weight", "stream_embeddings"),
        ("module._orig_mod.stream_embeddings", "stream_embeddings"),
        ("_fsdp_wrapped_module.model._fsdp_wrapped_module.stream_embeddings", "stream_embeddings"),
        ("base_model.model.stream_embeddings.modules_to_save.default.weight", "stream_embeddings"),
        ("model.base_model.model.model.layers.3.mlp.up_proj.lora_B.weight",
        "layers.3.mlp.up_proj.lora_b"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight",
        "layers.3.mlp.up_proj.lora_a"), ("base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight",
         "layers.3.mlp.up_proj.lora_b"),
        ("module.model.layers.12.self_attn.q_proj.lora_A.weight",
        "layers.12.self_attn.q_proj.lora_a"), ("pruner.lora_B.weight", "pruner.lora_b"),
        ("conditioner.mlp_out.weight", "conditioner.mlp_out"),
        ("base_model.model.model.layers.3.stream_gate", "layers.3.stream_gate"),
    ],
)  # fmt: skip
def test_stream_names(name, meaning):
    base, streams = sort_names([source(name, (2, 3) if "lora" in name or "mlp" in name else (2,))])
    assert not base
    assert list(streams) == [meaning]
    assert ("transpose" in streams[meaning].operations) == (".lora_" in name)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight", "module.model.norm.weight", "_orig_mod.model.norm.weight", "norm.weight",
        "base_model.model.model.norm.weight", "model.model.norm.weight", "model._orig_mod.norm.weight",
        "language_model.model.norm.weight", "model.language_model.norm.weight",
        "base_model.model.model.norm.base_layer.weight", "model.norm.gamma",
    ],
)  # fmt: skip
def test_base_names(name):
    base, streams = sort_names([source(name)])
    assert not streams
    assert list(fit_base(base, {"model.norm.weight": (2,)})) == ["model.norm.weight"]


def test_a_users_rules_come_first(tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"rename": [[r"net\.(.+)", r"model.\1"]], "drop": [r".*\.junk"]}))
    found, _ = sort_names([source("net.norm.weight"), source("a.junk")], read_rules(rules))
    assert list(found) == ["model.norm.weight"]
    for bad in ('{"rename": 1}', '{"rename": [["(", "x"]]}', '{"odd": []}', "[]"):
        rules.write_text(bad)
        with pytest.raises(CheckpointError):
            read_rules(rules)
    rules.write_text(json.dumps({"rename": [["a", r"\9"]]}))
    with pytest.raises(CheckpointError, match="does not work"):
        sort_names([source("a")], read_rules(rules))


def test_fused_rows_that_do_not_add_up_are_refused():
    fused = source("l.qkv_proj.weight", (7, 2))
    wanted = {f"l.{part}_proj.weight": (2, 2) for part in "qkv"}
    with pytest.raises(CheckpointError, match="6 rows in all"):
        fit_base({fused.name: fused}, wanted)
    parts = {f"l.{p}_proj.weight": source(f"l.{p}_proj.weight", (2, 2)) for p in "qkv"}
    parts["l.k_proj.weight"] = source("l.k_proj.weight", (2, 2), "BF16")
    with pytest.raises(CheckpointError, match="differ in dtype"):
        fit_base(parts, {"l.qkv_proj.weight": (6, 2)})
    assert fused.rows(2, 4).shape == (2, 2)


def test_a_tensor_says_what_is_done_to_it():
    a, b = source("a", (2, 3)), source("b", (4, 3))
    made = joined("c", [a, b]).rows(1, 3).transposed().cast("F16")
    assert (made.shape, made.dtype, made.start) == ((3, 2), "F16", None)
    assert made.operations == ("join", "split", "transpose", "F32 to F16")
    assert made.origin == "x.bin: a + x.bin: b"
    assert made.read().tolist() == [[3, 0], [4, 1], [5, 2]]
    assert a.cast("F32") is a
    assert source("d", (2,), "F64").operations == ("F64 to F32",)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_computed_must_be_finite(value):
    bits = np.array([1, value], np.float32)
    tensor = Tensor.in_file("w", "F32", (2,), Path("x.bin"), lambda: bits)
    with pytest.raises(CheckpointError, match=r"'x\.bin: w' holds NaN or infinite values as F16"):
        tensor.cast("F16").make()
    assert tensor.make()[0] is bits  # a copy of what there is


# ---- the hub -----------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub for a snapshot: the repository's file list, and its files."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.asked.append(self.path)
        if self.path.startswith("/api/models/a/b/tree/"):
            files = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": len(content)}
                for name, content in self.files.items()
            ]
            self.reply(200, json.dumps(files).encode(), body)
        elif self.path.startswith("/api/models/a/b"):
            siblings = [{"rfilename": name} for name in self.files]
            answer = json.dumps({"id": "a/b", "sha": self.commit, "siblings": siblings}).encode()
            self.reply(200, answer, body)
        elif self.path.startswith("/a/b/resolve/"):
            name = self.path.split("/", 5)[5]
            self.reply(200, self.files[name], body, ETag=f'"{abs(hash(name)):x}"')
        else:
            self.reply(404, b"{}", body)

    def reply(self, status, content, body, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", self.commit)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve one repository on this machine."""
    weights = write_weights(tmp_path / "w.safetensors", "a").read_bytes()
    Hub.files = {"config.json": b"{}", "model.safetensors": weights, "modeling.py": b"raise"}
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def download(hub, **settings):
    """Fetch as `locate` does, from the loopback hub."""
    from huggingface_hub._snapshot_download import snapshot_download as real

    address = f"http://127.0.0.1:{hub.server_port}"

    def snapshot_download(name, **options):
        return real(name, endpoint=address, **options, **settings)

    return snapshot_download


def test_a_repository_is_fetched_then_read_from_the_cache_without_network(
    hub, tmp_path, monkeypatch
):
    cache = str(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download(hub, cache_dir=cache))
    folder = locate("a/b", "main")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert not any("modeling.py" in path for path in Hub.asked)
    assert list(open_checkpoint(folder).tensors) == ["a"]
    hub.shutdown()
    offline = download(hub, cache_dir=cache, local_files_only=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert locate("a/b", "main") == folder
    with pytest.raises(CheckpointError, match="no folder"):
        locate("a/other")


def test_a_local_path_comes_first_and_nonsense_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert locate("a/b").is_dir()
    assert locate("b", beside=tmp_path / "a") == tmp_path / "a" / "b"
    with pytest.raises(OptionError, match="revision"):
        locate("a/b", "main")
    for name in ("a/b/c/d", "../nowhere", "", "a b", "x" * 5000, "a\0"):
        with pytest.raises(CheckpointError):
            locate(name)


# ---- numbers -----------------------------------------------------------------------------------


def test_casts_round_as_pytorch_does():
    torch = pytest.importorskip("torch")
    types = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
    }
    raw = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint64).astype(np.uint32)
    values = torch.from_numpy(raw.view(np.float32).copy())
    values = torch.cat([values[values.isfinite()], torch.randn(20_000), torch.tensor([0.0, -0.0])])
    for first in types:
        for second in ("F32", "F16", "BF16"):
            given = values.to(types[first])
            wanted = given.to(types[second])
            bits = (
                given.view(torch.int16).numpy().view(np.uint16)
                if first == "BF16"
                else given.numpy()
            )
            found = cast_bits(bits, first, second)
            finite = wanted.isfinite().numpy()
            view = wanted.view(torch.int16) if second == "BF16" else wanted
            theirs = view.numpy().view(np.uint16) if second == "BF16" else view.numpy()
            assert np.array_equal(found[finite], theirs[finite]), (first, second)
    nothing = cast_bits(np.array([np.nan, np.inf], np.float32), "F32", "BF16")
    assert nothing.tolist() == [0x7FC0, 0x7F80]


def test_nothing_is_left_open(tmp_path):
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("needs /proc")
    folder = folder_with(tmp_path, model=["a"])
    before = len(list(open_files.iterdir()))
    for _ in range(20):
        next(iter(open_checkpoint(folder).tensors.values())).read()
    assert len(list(open_files.iterdir())) == before


@pytest.mark.parametrize("in_kernel", [True, False])
def test_bytes_are_copied_from_file_to_file(tmp_path, in_kernel, monkeypatch):
    from mlx_specstream.weights import tensorfile
    from mlx_specstream.weights.tensorfile import write

    if not in_kernel:
        monkeypatch.delattr(write.os, "copy_file_range", raising=False)
    values = {name: np.random.default_rng(i).standard_normal(size) for i, (name, size) in
              enumerate({"a": 3, "b": 700_000, "c": 0, "d": 17}.items())}  # fmt: skip
    specs = [TensorSpec(name, "F64", value.shape) for name, value in values.items()]
    with TensorWriter(tmp_path / "in", specs, {"k": "v"}) as writer:
        for value in values.values():
            writer.write(value)
    source = tensorfile.open_tensors(tmp_path / "in", CheckpointError)
    names = ["d", "a", "c", "b"]
    with TensorWriter(tmp_path / "out", [source.entries[name] for name in names]) as writer:
        writer.copy(tmp_path / "in", source.entries["d"].start)
        writer.write(values["a"])
        writer.copy(tmp_path / "in", source.entries["c"].start)
        writer.copy(tmp_path / "in", source.entries["b"].start)
    found = tensorfile.open_tensors(tmp_path / "out", CheckpointError)
    for name in names:
        assert np.array_equal(found.read(name), values[name])
    specs = [TensorSpec("x", "U8", (10**7,))]
    with pytest.raises(EOFError), TensorWriter(tmp_path / "short", specs) as writer:
        writer.copy(tmp_path / "in", 0)
