"""Models whose layers differ: adapters go where all layers have a place for them, or it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_specstream.commands import train as command
from mlx_specstream.errors import ModelError, OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.train.options import TrainOptions
from tests.support.tiny_models import tiny_random_model
from tests.train.tiny_run import QUICK, run_tiny

SHORT = {"iters": 2, "verdict_prompts": 1, "verdict_tokens": 3, "steps_per_eval": 2}


def config_of(name: str, **fields: Any) -> Any:
    return command._config(TrainOptions(**{**QUICK, **fields}), Backbone(tiny_random_model(name)))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("qwen3_moe", "self_attn.q_proj"),  # experts choose by `mlp.gate`
        ("deepseek_v3", "self_attn.o_proj"),  # the first layers are dense
        ("gemma4_text", "self_attn.q_proj"),  # of different widths
        ("nemotron-nas", "mlp.down_proj"),  # layers without attention
    ],
)
def test_all_means_what_the_adapted_layers_share(name: str, own: str, tmp_path: Path) -> None:
    targets = config_of(name, num_msa_layers=3).target_modules
    assert own in targets
    assert not any(target.endswith(".gate") for target in targets)
    run_tiny(tmp_path / "out", model=tiny_random_model(name, vocab_size=24), **SHORT)
    assert (tmp_path / "out" / "streams.safetensors").exists()


def test_shared_mode_adapts_all_layers() -> None:
    assert "self_attn.q_proj" in config_of("nemotron-nas", num_msa_layers=1).target_modules
    shared = config_of("nemotron-nas", num_msa_layers=1, mode="shared").target_modules
    assert shared
    assert "self_attn.q_proj" not in shared


def test_a_module_that_only_some_layers_have_is_refused() -> None:
    with pytest.raises(OptionError, match="not all of the model's adapted layers have"):
        config_of("nemotron-nas", num_msa_layers=3, target_modules=("self_attn.q_proj",))


def test_experts_are_chosen_by_an_adapter_only_if_it_is_named() -> None:
    named = config_of("qwen3_moe", target_modules=("mlp.gate",)).target_modules
    assert named == ("mlp.gate",)


def test_layers_with_states_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    backbone = Backbone(tiny_random_model("qwen3_5"))
    model = StreamModel(backbone.model, backbone, None, "m")
    with pytest.raises(ModelError, match=r"type 'qwen3_5'.*keep a state"):
        command.make_task(
            model, None, TrainOptions(**QUICK), [], [], folder=tmp_path / "out", base_name=None
        )


def test_nothing_in_common_is_refused() -> None:
    options = TrainOptions(**QUICK)
    with pytest.raises(OptionError, match="no linear module in common"):
        options.stream_config(4, ())
    assert TrainOptions(**{**QUICK, "lora_rank": 0}).stream_config(4, ()).target_modules == ()
