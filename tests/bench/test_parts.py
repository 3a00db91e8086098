"""Prompts, settings and figures of a benchmark, without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_specstream.bench.cases import Case, chosen_cases, read_cases
from mlx_specstream.bench.methods import Method, parse_setting, parse_streams
from mlx_specstream.bench.plot_style import MISSING, available
from mlx_specstream.bench.plots import cost, roofline, subtitle, write_plots
from mlx_specstream.bench.report import headline, markdown
from mlx_specstream.bench.result import AskedPrompt, MethodRun, Result
from mlx_specstream.bench.roofline import Ceilings, measure_ceilings, points
from mlx_specstream.bench.run import Bench
from mlx_specstream.bench.session import duration, warnings_for
from mlx_specstream.bench.summary import ALL, Spread, summarised
from mlx_specstream.errors import DataError, OptionError
from mlx_specstream.machine import Machine
from mlx_specstream.prompts import Prompt


def test_spec_bench_lines(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(
        '{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}\n'
        '{"question_id": 82, "category": "qa", "turns": ["Who?"], "reference": ["me"]}\n'
    )
    first, second = read_cases(str(path))
    assert (first.category, first.prompt.title, first.more_turns) == (
        "writing",
        "Write.",
        ("Rewrite.",),
    )
    assert (second.category, second.more_turns) == ("qa", ())
    assert first.sha256 != second.sha256


def test_categories_of_files(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    test = tmp_path / "sql" / "test.jsonl"
    test.write_text('{"prompt": "a", "completion": "b"}\n{"text": "c"}\n')
    assert [case.category for case in read_cases(str(test))] == ["sql", "sql"]
    assert [case.category for case in read_cases(f"mine={test}")] == ["mine", "mine"]
    lines = tmp_path / "some.txt"
    lines.write_text("one\ntwo\n")
    assert [(c.category, c.prompt.title) for c in read_cases(str(lines))] == [
        ("some", "one"),
        ("some", "two"),
    ]
    lines.with_suffix(".jsonl").write_text('"just text"\n')
    with pytest.raises(DataError, match="holds no prompt"):
        read_cases(str(lines.with_suffix(".jsonl")))


def test_prompts_are_drawn_by_seed_and_categories_take_turns() -> None:
    a = chosen_cases(["built-in"], ["sql", "chat"], 3, seed=1)
    assert [case.category for case in a] == ["sql"] * 3 + ["chat"] * 3
    b = chosen_cases(["built-in"], ["sql", "chat"], 3, seed=1, in_turns=True)
    assert [case.category for case in b] == ["sql", "chat"] * 3
    assert {case.sha256 for case in a} == {case.sha256 for case in b}
    assert a == chosen_cases(["built-in"], ["sql", "chat"], 3, seed=1)
    assert a != chosen_cases(["built-in"], ["sql", "chat"], 3, seed=2)
    every = chosen_cases(["built-in"])
    assert len({case.sha256 for case in every}) == len(every) == 69
    assert min(every.count(case) for case in every) == 1


def test_settings() -> None:
    method = parse_setting("tree=16 prune=8:0.1 schedule=inline conditioning=no", "auto")
    assert method.label == "tree 16, pruned 8:0.1, inline, unconditioned"
    assert method.streams == "auto"
    assert Method.from_dict(method.to_dict()) == method
    assert parse_setting("tree=chain streams=x,sql=y", "auto").streams_for("sql") == "y"
    assert parse_streams("x, sql=y") == ("x", {"sql": "y"})
    with pytest.raises(OptionError, match="yes or no"):
        parse_setting("tree=8 conditioning=maybe", "auto")
    with pytest.raises(DataError, match="not known"):
        Method.from_dict({"kind": "magic"})


def run(method: str, decode_s: float, **values: object) -> MethodRun:
    made = MethodRun(method, 0, 0, 0.1, decode_s, 11, 11, 0, [], 1000)
    return replace(made, **values)  # type: ignore[arg-type]


def made_result() -> Result:
    from mlx_specstream.bench.result import BenchSettings

    methods = [Method("mlx-lm"), Method("streams", tree="8", streams="s")]
    settings = BenchSettings("m", None, ["built-in"], [], None, 16, 1, 0, None, 0.0, 0, methods)
    fast = {"passes": 5, "drafted": 28, "by_accepted": [1, 2, 1]}
    asked = [
        AskedPrompt("sql", "q", "1", 0, 40, [run("mlx-lm", 1.0), run("tree 8", 0.5, **fast)]),
        AskedPrompt("sql", "r", "2", 0, 40, [run("mlx-lm", 1.0), run("tree 8", 0.8, **fast)]),
        AskedPrompt("chat", "s", "3", 0, 40, [run("mlx-lm", 1.0), run("tree 8", 1.25, **fast)]),
    ]
    model = {
        "name": "m", "family": "llama", "dtype": "float32", "bits": 32, "layers": 4,
        "params": 5000, "layer_params": 1000, "head_params": 1000, "weight_bytes": 20000,
        "used": {"tree 8": "s"},
        "streams": {"s": {"num_streams": 4, "num_msa_layers": 2, "mode": "lossless"}},
    }  # fmt: skip
    return Result(settings, Machine(chip="X"), model, "now", asked=asked)


def test_figures() -> None:
    lines = {(line.category, line.method): line for line in summarised(made_result())}
    sql = lines["sql", "tree 8"]
    assert sql.speedup == Spread(1.4375, 1.625, 1.8125)
    assert sql.overall == pytest.approx(2.0 / 1.3)
    assert sql.tokens_s == pytest.approx(20 / 1.3)
    assert sql.tokens_per_step == pytest.approx(22 / 10)
    assert sql.step_s == pytest.approx(1.3 / 8)  # the first pass of each is prefill
    assert sql.accepted == (0.75, 0.25)
    assert sql.acceptance == pytest.approx(8 / 56)
    assert lines[ALL, "tree 8"].prompts == 3
    assert lines["chat", "tree 8"].speedup.median == 0.8
    assert lines[ALL, "mlx-lm"].speedup == Spread(1, 1, 1)


def test_repeats_count_by_their_median() -> None:
    result = made_result()
    more = [run("mlx-lm", s) for s in (1.0, 9.0)] + [run("tree 8", s) for s in (0.5, 70.0)]
    result.asked[0].runs.extend(more)
    lines = {(line.category, line.method): line for line in summarised(result)}
    assert lines["sql", "tree 8"].speedup.high == pytest.approx(1.8125)
    assert lines["sql", "tree 8"].runs == 4


def test_an_answer_of_one_token_has_no_speed() -> None:
    result = made_result()
    result.asked[2].runs[1] = run("tree 8", 0.0, tokens=1)
    assert ("chat", "tree 8") not in {(line.category, line.method) for line in summarised(result)}


def test_the_roofline() -> None:
    result = made_result()
    plain, tree = points(result)
    # One row: two operations per weight of four bytes.
    assert (plain.rows, plain.intensity) == (1, 0.5)
    # 84 drafts in 15 passes; layers and head read again for the streams.
    assert tree.rows == pytest.approx(1 + 84 / 15)
    flop = 5000 * tree.rows + 4 * 1000 * 4 * 0.5 + 4 * 1000
    assert tree.intensity == pytest.approx(2 * flop / (4 * (5000 + 2000 + 1000)))


def test_ceilings() -> None:
    found = measure_ceilings(mx.float32, width=256, rows=64)
    assert found.bytes_s > 0
    assert found.ridge == pytest.approx(found.flop_s / found.bytes_s)


def test_plots(tmp_path: Path, ceilings: Ceilings) -> None:
    if not available():
        pytest.skip(MISSING)
    result = made_result()
    assert write_plots(result, tmp_path) == ["speedup.png", "acceptance.png"]
    result.ceilings = ceilings.to_dict()
    assert write_plots(result, tmp_path) == ["speedup.png", "acceptance.png", "roofline.png"]
    one = {
        "plan": "plain",
        "kind": "plain",
        "rows": 1,
        "tokens_per_step": 1,
        "step_s": 1,
        "speedup": 1,
    }
    tree = {**one, "plan": "4", "kind": "best, deferred", "rows": 4, "tokens_per_step": 2.5}
    result.plans = {"s": {"chosen": "4", "forecasts": [one, tree]}}
    row = {"plan": "plain", "measured_tokens_per_s": 10, "predicted_tokens_per_s": 10}
    result.trees = {"sql": {"choice": "plain", "rows": [row]}}
    assert write_plots(result, tmp_path)[3:] == ["cost.png", "trees.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.glob("*.png"))


def test_warnings() -> None:
    slow = Machine(backend="cpu", blas="reference BLAS", cores=2)
    assert "pip install scipy-openblas32" in warnings_for(slow)[0]
    assert warnings_for(Machine(backend="metal")) == []


def test_a_busy_machine_is_named_in_report_and_plots(tmp_path: Path) -> None:
    result = made_result()
    assert "uncertain" not in markdown(result) + subtitle(result)
    result.other_cores = 1.5
    result.save(tmp_path / "result.json")
    again = Result.load(tmp_path / "result.json")
    assert "Note: other programs kept 1.5 of" in markdown(again)
    assert "other programs ran: uncertain" in subtitle(again)


def test_few_prompts_give_no_headline_and_one_no_spread() -> None:
    result = made_result()
    assert headline(result) == "3 prompts: too few for a figure over all."
    assert "| chat | tree 8 | 1 | 8.0 | 0.80 | – |" in markdown(result)
    result.asked += [replace(result.asked[0], sha256=name) for name in "45"]
    assert headline(result).startswith("tree 8: 1.41x mlx-lm over all tokens; from 0.80x (chat)")


def test_rows_are_whole_and_no_method_hides_another(ceilings: Ceilings) -> None:
    if not available():
        pytest.skip(MISSING)
    result = made_result()
    result.ceilings = ceilings.to_dict()
    result.asked = [
        replace(one, runs=[*one.runs, replace(one.runs[0], method="plain, ours")])
        for one in result.asked
    ]
    result.settings.methods.insert(1, Method("plain"))
    plot = roofline(result)
    assert plot is not None
    drawn = [line for line in plot.axes[0].lines if line.get_marker() not in ("None", "")]
    assert len({tuple(line.get_xydata()[0]) for line in drawn}) < len(drawn)  # two coincide
    assert len({line.get_markersize() for line in drawn}) == len(drawn)
    assert {line.get_markerfacecolor() for line in drawn} == {"none"}
    one = {
        "plan": "plain",
        "kind": "plain",
        "rows": 1,
        "tokens_per_step": 1,
        "step_s": 1,
        "speedup": 1,
    }
    trees = [{**one, "plan": str(n), "kind": "best, deferred", "rows": n} for n in (3, 4)]
    result.plans = {"s": {"chosen": "4", "forecasts": [one, *trees]}}
    plot = cost(result)
    assert plot is not None
    plot.canvas.draw()
    assert all(float(tick).is_integer() for tick in plot.axes[0].get_xticks())


def test_a_quick_run_shortens_answers_rather_than_asking_fewer_than_five(tmp_path: Path) -> None:
    """The clock has spent 25 of 105 seconds on loading and on the costs of plans."""
    made = made_result()
    for limit, begun, tokens in ((105.0, 25.0, 48), (105.0, 65.0, 40), (105.0, 104.0, 16)):
        settings = replace(made.settings, limit_s=limit, max_tokens=48, methods=[Method("mlx-lm")])
        bench = Bench.__new__(Bench)
        bench.result = Result(settings, made.machine, made.model, "now")
        bench.cases = [Case("chat", Prompt.user(str(n))) for n in range(8)]
        bench.begun, bench.clock = 0.0, lambda begun=begun: begun  # type: ignore[misc]
        bench._warm = [run("mlx-lm", 2.0)]  # 0.1 s to read, 0.2 s a token
        bench.shorten()
        assert bench.result.settings.max_tokens == tokens


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 80, 300, 9000)] == ["1 s", "80 s", "5 min", "2.5 h"]
