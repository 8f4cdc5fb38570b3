"""What the table-making scripts share: finished work is kept, never silently used for another question, and paces are a step's."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worldline.trainers.loop import LoopConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import make_posttraining
import result_tables
import stages


@dataclass(frozen=True)
class Settings:
    out: Path
    data: tuple[Path, ...]
    loop: LoopConfig


def stage(calls: list[Path]) -> Any:
    """A stage that leaves behind what a training does, and nothing learned."""

    def run(config: Settings) -> Path:
        calls.append(config.out)
        (config.out / "training").mkdir(parents=True, exist_ok=True)
        (config.out / "config.json").write_text(json.dumps({"provenance": {"steps": config.loop.steps}}))
        claim = {"config": {"data": [str(folder) for folder in config.data]}}
        (config.out / "training/run.json").write_text(json.dumps(claim))
        return config.out

    return SimpleNamespace(run=run)


def test_a_finished_training_is_not_run_again_and_a_longer_one_is(tmp_path: Path) -> None:
    calls: list[Path] = []
    module, data = stage(calls), (tmp_path / "data",)
    for steps in (10, 10, 20):
        assert stages.train(module, Settings(tmp_path / "a", data, LoopConfig(steps=steps))) == tmp_path / "a"
    assert calls == [tmp_path / "a"] * 2


def test_what_learned_from_other_data_is_refused_with_both_named(tmp_path: Path) -> None:
    calls: list[Path] = []
    module, loop = stage(calls), LoopConfig(steps=10)
    stages.train(module, Settings(tmp_path / "a", (tmp_path / "one",), loop))
    with pytest.raises(SystemExit, match=r"learned from \['.*/one'\], now \['.*/two'\]: use another --out"):
        stages.train(module, Settings(tmp_path / "a", (tmp_path / "two",), loop))
    assert len(calls) == 1


def busy(seconds: float) -> None:
    """CPU time, not waiting, which does not count."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_was_trained_otherwise_is_refused(tmp_path: Path) -> None:
    """A table must not show what another command found under its own settings."""
    calls: list[Path] = []
    module, settings = stage(calls), Settings(tmp_path / "a", (tmp_path / "one",), LoopConfig(steps=10))
    stages.train(module, settings)
    claim = settings.out / "training/run.json"
    claim.write_text(json.dumps({"config": {"data": [str(tmp_path / "one")], "width": 32}}))

    @dataclass(frozen=True)
    class Wide(Settings):
        width: int = 64

    assert stages.train(module, Wide(settings.out, settings.data, settings.loop, width=32)) == settings.out
    with pytest.raises(SystemExit, match=r"was trained with another width: use another --out"):
        stages.train(module, Wide(settings.out, settings.data, settings.loop))


def test_what_was_made_with_something_else_is_refused(tmp_path: Path) -> None:
    report, result = tmp_path / "eval", tmp_path / "returns.json"
    assert not stages.kept(report, {"model": "abc", "frames": 41}, done="report.json")
    assert not report.exists()  # commands claim new folders
    report.mkdir()
    assert not stages.kept(report, {"model": "abc", "frames": 41}, done="report.json")  # interrupted
    (report / "report.json").write_text("{}")
    assert stages.kept(report, {"model": "abc", "frames": 41}, done="report.json")
    with pytest.raises(SystemExit, match=r"eval was made with another model: use another --out, or delete it"):
        stages.kept(report, {"model": "def", "frames": 41}, done="report.json")
    assert not stages.kept(result, {"episodes": 20})
    result.write_text("[]")
    assert stages.kept(result, {"episodes": 20})
    with pytest.raises(SystemExit, match="another episodes"):
        stages.kept(result, {"episodes": 10})


def test_a_pace_leaves_out_what_starting_costs_and_is_measured_once(tmp_path: Path) -> None:
    runs: list[int] = []

    def run(steps: int, folder: Path) -> None:
        runs.append(steps)
        folder.mkdir()
        busy(0.1 + 0.01 * steps)

    paces = [stages.pace(run, tmp_path / "a", (4, 14)) for _ in range(2)]
    assert paces[0] == paces[1] == pytest.approx(0.01, rel=0.3)
    assert runs == [4, 4, 14]
    assert [path.name for path in tmp_path.iterdir()] == ["a-pace.json"]  # no scratch folder is left


def test_a_pace_that_is_no_time_is_refused_and_not_kept(tmp_path: Path) -> None:
    def faster(steps: int, folder: Path) -> None:
        folder.mkdir()
        busy(0.2 / steps)

    with pytest.raises(SystemExit, match=r"8 steps took .* CPU seconds, 2 took .*: no pace"):
        stages.pace(faster, tmp_path / "a", (2, 8))
    assert not (tmp_path / "a-pace.json").exists()


def test_post_training_by_other_settings_is_refused_by_name_and_timed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iteration of twice the rows once had the pace of the one before, and its table the results."""
    runs: list[tuple[str, int, int]] = []

    def run(settings: Any, progress: bool = True) -> None:
        runs.append((settings.out.name, settings.rl.grpo.group, settings.rl.iterations))
        settings.out.mkdir()
        (settings.out / "report.json").write_text("{}")
        busy(0.002 * settings.rl.grpo.group * settings.rl.iterations)

    monkeypatch.setattr(make_posttraining, "run_posttrain", run)
    monkeypatch.setattr(make_posttraining, "weights_of", lambda folder: folder.name)
    config = make_posttraining.MakePosttraining(out=tmp_path, rl_minutes=0.01)
    larger = replace(config, rl=replace(config.rl, grpo=replace(config.rl.grpo, group=16)))
    for _ in range(2):
        assert make_posttraining.post_train(config, 0) == tmp_path / "rlir0"
    *timed, last = runs
    assert len(timed) == 3 and last[:2] == ("rlir0", 8) and 20 < last[2] < 50  # 0.6 seconds at 0.016 each
    with pytest.raises(SystemExit, match=r"rlir0 was made with another rl\.grpo\.group: use another --out"):
        make_posttraining.post_train(larger, 0)
    with pytest.raises(SystemExit, match=r"rlir0 was made with another rl\.check_clips: use another --out"):
        make_posttraining.post_train(replace(config, rl=replace(config.rl, check_clips=64)), 0)
    assert len(runs) == 4  # nor was anything timed
    shutil.rmtree(tmp_path / "rlir0")
    make_posttraining.post_train(larger, 0)
    *timed, last = runs[4:]
    assert len(timed) == 3 and last[:2] == ("rlir0", 16) and 10 < last[2] < 25


def leave(path: Path) -> str:
    path.write_text("done")
    return path.name


def fail() -> str:
    raise ValueError("this one fails")


@pytest.mark.parametrize("jobs", [1, 2])
def test_independent_calls_answer_in_their_order(tmp_path: Path, jobs: int) -> None:
    calls = [partial(leave, tmp_path / name) for name in ("a", "b", "c")]
    assert stages.together(jobs, calls) == ["a", "b", "c"]


def test_a_call_that_fails_lets_the_others_keep_their_work(tmp_path: Path) -> None:
    calls: list[Callable[[], str]] = [fail, partial(leave, tmp_path / "a"), partial(leave, tmp_path / "b")]
    with pytest.raises(ValueError, match="this one fails"):
        stages.together(2, calls)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_table_has_a_cell_for_every_column() -> None:
    head = "| policy | true success |"
    lines = result_tables.table(head, [result_tables.row("bc", "0.50")]).splitlines()
    assert lines == [head, "|---|---|", "| bc | 0.50 |"]
    assert result_tables.number(None) == "–" and result_tables.number(0.126) == "0.13"
