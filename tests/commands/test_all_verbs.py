"""Every verb through `worldline.cli.main`, from a simulator to a ranking."""

import json
import re
import shutil
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands.conftest import HORIZON, Lab, Run, do, record
from tests.commands.dots import WORLD
from worldline.commands import ranking
from worldline.data import LeRobotDataset
from worldline.eval.protocol import PROTOCOL
from worldline.eval.report import REPORT_KEYS


def results(out: Path, *, videos: bool = True) -> dict:
    report = json.loads((out / "report.json").read_text())
    assert tuple(report) == REPORT_KEYS
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "the page fetches something"
    assert ("data:video/mp4" in page) == videos
    return report["results"]


def test_imagine_writes_as_many_frames_as_the_episode_has(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for actions, frames in (("true", None), ("negated", 4)):
        out = tmp_path / f"{actions}.mp4"
        options = ["--actions", actions, *(["--frames", frames] if frames else [])]
        said = worldline("imagine", "--world-model", lab.wm, "--data", lab.data, "--episode", 3, "--out", out, *options)
        assert said.code == 0 and str(out) in said.out
        with av.open(str(out)) as video:
            count = sum(1 for _ in video.decode(video=0))
        assert count == (frames or LeRobotDataset(lab.data).length(3))


def test_eval_reports_what_the_documentation_promises(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    said = worldline(
        "eval", "--world-model", lab.wm, "--data", lab.data, "--split", "all", "--max-episodes", 4, "--frames", 6,
        "--scorer", lab.scorer, "--videos", 1, "--doubt-steps", 2, "--out", out,
    )  # fmt: skip
    assert said.code == 0 and "report.html" in said.out
    found = results(out)
    assert found["doubt"]["limit"] > 0 and found["doubt"]["episodes"] == 4
    assert -1 <= found["doubt"]["correlation_between"] <= 1 and "between episodes" in (out / "report.html").read_text()
    assert found["episodes"] == 4 and found["frames"] == 6
    assert {"horizons", "against", "action_sensitivity", "pose_error", "speed", "lpips", "replay_diagnostic"} <= set(
        found
    )
    assert {row["horizon"] for row in found["horizons"]} == {1, 2, 5}
    assert {row["horizon"] for row in found["against"]} == {1, 2, 3, 4, 5}, "the gain is told at every frame"
    assert found["worst_gains"][0]["horizons"] == 4
    assert {"true", "copy-first", "tokenizer"} <= {row["predictor"] for row in found["horizons"]}
    assert set(found["action_sensitivity"]["rgb"]) == {"true", "shuffled", "negated", "zeroed"}
    assert found["speed"]["frames_per_second"] > 0
    command = json.loads((out / "report.json").read_text())["command"]
    assert "--max-episodes 4" in command and "--split all" in command


def test_eval_prints_its_protocol_and_what_departs_from_it(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    probe, out = tmp_path / "probe", tmp_path / "report"
    small = ["--max-steps", 2, "--loop.warmup", 1, "--loop.batch-size", 4]
    trained = worldline(
        "train", "probe", "--data", lab.data, "--target", "pose", "--camera", "rgb", "--out", probe, *small
    )
    assert trained.code == 0, trained.err
    said = worldline(
        "eval", "--world-model", lab.wm, "--data", lab.data, "--split", "all", "--max-episodes", 4, "--frames", 6,
        "--history-level", 0.2, "--pose-probes", probe, "--videos", 0, "--out", out,
    )  # fmt: skip
    assert said.code == 0, said.err
    found, page = results(out, videos=False), (out / "report.html").read_text()
    protocol = found["protocol"]
    assert protocol["version"] == PROTOCOL.version and protocol["version"] in page
    used = {
        "frames": 6,
        "episodes": 4,
        "solver_steps": 1,
        "history_level": 0.2,
        "guidance": 1.0,
        "cache_write": "clean",
    }
    assert protocol["used"] == {**used, "seed": 0}
    assert protocol["deviations"][0] == "history_level is not the checkpoint's own" and len(protocol["deviations"]) == 2
    assert len(found["drift"]["moving"]["share"]) == 5
    assert "imagined frame 100 required" in found["drift"]["excess"]["reason"]
    assert "16 imagined frames required, got 4 of 5" in found["latent_frechet"]["reason"]
    assert {r["camera"] for r in found["multi_view"]["pose_error"]} == {"rgb"}
    assert "no I3D weights were given" in found["fvd"]["reason"]


def test_eval_refuses_judges_of_another_kind(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    do("train", "probe", "--data", lab.data, "--target", "action", "--out", probe, "--max-steps", 1, "--loop.warmup", 1)
    for option, value, reason in (
        ("--probe", probe, "--probe: a probe of object or state is required"),
        ("--identity-probe", probe, "--identity-probe: a probe of identity is required"),
        ("--pose-probes", probe, "a probe of the pose from one camera required, got action"),
        ("--action-free", lab.wm, "trained with --model.network.actions False is required"),
        ("--i3d", tmp_path / "i3d.pt", "--i3d: the TorchScript file of I3D is required, there is none at"),
    ):
        said = worldline("eval", "--world-model", lab.wm, "--data", lab.data, "--split", "all", "--frames", 4,
                         "--out", tmp_path / "report", option, value)  # fmt: skip
        assert said.code == 2 and reason in " ".join(said.err.split()), said.err
        assert not (tmp_path / "report").exists()


def test_what_keeps_nothing_does_not_promise_to_go_on(
    lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worldline.commands import dreaming

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dreaming, "evaluate_world_model", stopped)
    said = worldline(
        "eval", "--world-model", lab.wm, "--data", lab.data, "--split", "all", "--out", tmp_path / "report"
    )
    assert said.code == 130 and said.err.strip() == "worldline: interrupted"
    said = worldline("--version")
    assert said.code == 0 and said.out.startswith("worldline 0.")


def test_eval_joins_datasets_and_counts_actions_out_of_range(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    wild, out = tmp_path / "wild", tmp_path / "report"
    shutil.copytree(lab.data, wild)
    for file in wild.glob("data/*/*.parquet"):
        content = pq.read_table(file)
        actions = content["action"].to_pylist()
        actions[0][1] = 7.0  # the first row's second value: block 0 of episode 0
        at, field = content.schema.get_field_index("action"), content.schema.field("action")
        pq.write_table(content.set_column(at, field, pa.array(actions, type=field.type)), file)
    both = ["eval", "--world-model", lab.wm, "--data", lab.data, wild, "--split", "all", "--max-episodes", 3]
    both += ["--frames", 6, "--videos", 0, "--out", out]
    said = worldline(*both)
    assert said.code == 2 and "action_1 from -1 to 1, got 7 in episode 20, block 0" in said.err
    assert "(1 of 120 values are out of range). Give --clip-actions True" in said.err
    assert worldline(*both, "--clip-actions", True).code == 0
    found = results(out, videos=False)
    assert found["episodes"] == 6 and found["actions_out_of_range"] == {
        "values": 120,
        "outside": 1,
        "by_dimension": {"action_0": 0, "action_1": 1},
    }
    assert "1 of 120 action values were out of range" in (out / "report.html").read_text()
    film = ["imagine", "--world-model", lab.wm, "--data", wild, "--episode", 0, "--out", tmp_path / "film.mp4"]
    assert worldline(*film).code == 2 and worldline(*film, "--clip-actions", True).code == 0


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the policies that were rolled out in imagination, in order."""
    called: list[str] = []
    whole = ranking.imagine_policy

    def spy(*arguments, **options):
        called.append(options["label"])
        return whole(*arguments, **options)

    monkeypatch.setattr(ranking, "imagine_policy", spy)
    return called


def test_rank_from_held_out_frames_and_again_with_one_more(
    lab: Lab, worldline: Run, tmp_path: Path, imagined: list[str]
) -> None:
    out = tmp_path / "rank"
    common = ["rank", "--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data, "--out", out]
    common += ["--imagined-episodes", 8, "--frames", 6, "--videos", 1, "--policies"]
    first = worldline(*common, lab.bc, lab.other)
    assert first.code == 0 and str(out / "report.html") in first.out
    assert "imagine bc" in first.err  # the progress bar
    assert imagined == ["imagine bc", "imagine other"]
    found = results(out)
    assert {row["policy"] for row in found["policies"]} == {"bc", "other"}
    assert {row["policy"] for row in found["actions_out_of_range"]} == {"bc", "other"}
    assert found["statistics"] is None and found["truth"] is None and found["replay_diagnostic"]["threshold"] > 0

    assert worldline(*common, lab.bc, lab.other).code == 0
    assert len(imagined) == 2, "kept rollouts were rolled out again"
    again = results(out)
    assert again["policies"] == found["policies"]

    worse = f"{lab.bc}@noise=2,lag=2"
    assert worldline(*common, lab.bc, lab.other, lab.diffusion, worse).code == 0
    assert imagined[2:] == ["imagine diffusion", "imagine bc@noise=2,lag=2"]
    rates = [row["imagined"] for row in results(out)["policies"]]
    assert len(rates) == 4 and rates == sorted(rates, reverse=True)

    # other weights in the same folder are another policy
    config = lab.wm / "tokenizer" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert worldline(*common, lab.bc, lab.other).code == 0
    assert len(imagined) == 6


def test_replays_of_several_datasets_set_the_threshold(
    lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "more", 16, "--seed", 5)
    replayed: list[int] = []
    whole = ranking.imagine_replays

    def spy(dream, scorer, replays, **options):
        replayed.append(len(replays.episodes))
        return whole(dream, scorer, replays, **options)

    monkeypatch.setattr(ranking, "imagine_replays", spy)
    out = tmp_path / "rank"
    common = ["rank", "--world-model", lab.wm, "--scorer", lab.scorer, "--out", out, "--policies", lab.bc, lab.other]
    common += ["--imagined-episodes", 4, "--videos", 0, "--replays", "all", "--data"]
    assert worldline(*common, lab.data).code == 0
    assert worldline(*common, lab.data, tmp_path / "more").code == 0
    assert replayed[1] == replayed[0] + 16
    found = results(out, videos=False)
    diagnostic = found["replay_diagnostic"]
    assert diagnostic["calibration"]["episodes"] == replayed[1]
    between = diagnostic["threshold_interval"]
    assert between["low"] <= diagnostic["threshold"] <= between["high"]
    for row in found["policies"]:
        span = row["imagined_by_threshold"]
        assert span["low"] <= row["imagined"] <= span["high"]
    assert worldline(*common, lab.data, tmp_path / "more").code == 0
    assert len(replayed) == 2, "kept replays were imagined again"


def test_rank_against_a_simulator(lab: Lab, worldline: Run, tmp_path: Path, imagined: list[str]) -> None:
    out = tmp_path / "rank"
    runner, idler = "tests.commands.dots:runner", "tests.commands.dots:idler"
    command = [
        "rank", "--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data, "--out", out, "--truth", WORLD,
        "--horizon", 20, "--processes", 0, "--episodes", 6, "--imagined-episodes", 8, "--correct-with", 4,
        "--through-tokenizer", 4, "--own-actions", 5, "--policies", idler, runner, lab.bc, "tests.commands.dots:mixed",
    ]  # fmt: skip
    said = worldline(*command)
    assert said.code == 0, said.err
    assert "simulate runner" in said.err.replace("tests.commands.dots:", "")
    found = results(out)
    real = {row["policy"].rpartition(":")[2]: row["real"] for row in found["policies"]}
    assert real["runner"] == 1.0 and real["idler"] == 0.0  # and `mixed` ends episodes at different frames
    assert found["frames"] == 11
    through = found["through_tokenizer"]
    assert through["episodes"] == 4 and len(through["policies"]) == 4
    # the lab's tokenizer is pixel patches, which lose nothing: nothing may change
    assert all(row["through"] == row["real"] for row in through["policies"])
    # these two do the same whatever they see, so in imagination too
    own = {row["policy"].rpartition(":")[2]: row for row in found["own_actions"]["policies"]}
    assert found["own_actions"]["episodes"] == 5
    assert own["runner"]["own_actions"] == 1.0 and own["idler"]["own_actions"] == 0.0
    assert own["idler"]["agreement"] == pytest.approx(1 - own["idler"]["imagined"])
    assert found["statistics"]["policies"] and found["corrected"]["real_rollouts"] == 4
    rates = [row["imagined"] for row in found["policies"]]
    assert rates == sorted(rates, reverse=True)
    assert any("rollouts of tests.commands.dots:mixed are in" in text for text in found["independence"])
    assert not any("also starts of" in text or "could not be checked" in text for text in found["independence"])

    before = len(imagined)
    assert worldline(*command).code == 0
    assert len(imagined) == before
    assert results(out)["policies"] == found["policies"]

    # against itself nothing changes; against a ranking of other policies nothing can be said
    again = [*command, "--out", tmp_path / "again", "--against", out]
    assert worldline(*again).code == 0
    change = results(tmp_path / "again")["change"]
    assert change["episodes"] == 6 and change["measures"]["bias"]["before"] == change["measures"]["bias"]["after"]
    assert change["measures"]["bias"]["low"] == change["measures"]["bias"]["high"] == 0
    said = worldline(*again[:-2], "--against", tmp_path / "again", "--policies", idler, runner, lab.bc)
    assert said.code == 2 and "a ranking of the same policies is required" in said.err
    said = worldline(*again[:-2], "--against", lab.wm)
    assert said.code == 2 and "the folder of a report is required" in said.err


def test_rank_says_when_true_starts_are_training_starts(
    lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = [int(p["seed"]) for p in LeRobotDataset(lab.data).episode_table["provenance"]]
    from worldline.commands import rollouts

    monkeypatch.setattr(rollouts, "episode_seed", lambda seed, index: recorded[index])
    said = worldline(
        "rank", "--world-model", lab.wm, "--scorer", lab.scorer, "--out", tmp_path / "rank", "--truth", WORLD, *HORIZON[:2],
        "--processes", 0, "--episodes", 2, "--imagined-episodes", 2, "--videos", 1,
        "--policies", "tests.commands.dots:runner", "tests.commands.dots:idler",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert any("2 of 2 true starts are also starts of" in text for text in results(tmp_path / "rank")["independence"])


@pytest.mark.parametrize(
    ("part", "kind"), [("tok", "patches"), ("wm", "autoregressive"), ("scorer", "success"), ("bc", "bc")]
)
def test_show_prints_the_spec(lab: Lab, worldline: Run, part: str, kind: str) -> None:
    said = worldline("show", lab.root / part)
    shown = json.loads(said.out)
    assert said.code == 0 and shown["kind"] == kind and shown["weights"] >= 0
    assert "data" in shown["provenance"]
    if part != "tok":
        assert [c["name"] for c in shown["spec"]["cameras"]] == ["rgb"] and shown["spec"]["fps"] == 10.0


def test_inspect_reports_the_dataset(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    said = worldline("inspect", lab.data, "--out", tmp_path / "inspect", "--max-episodes", 3)
    assert said.code == 0 and "report.html" in said.out
    assert json.loads((tmp_path / "inspect" / "report.json").read_text())["results"]
    assert (
        worldline("inspect", lab.data, "--out", tmp_path / "inspect", "--max-episodes", 3).code == 0
    )  # again, over it


def test_an_interrupted_training_exits_130_and_goes_on(
    lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worldline.trainers import policy

    out = tmp_path / "bc"
    command = ["train", "policy", "--data", lab.data, "--out", out, "--max-steps", 6, "--loop.save-every", 2]
    command += ["--policy.encoder.channels", 8, "--policy.encoder.size", 16, "--loop.batch-size", 4]
    whole = policy._PolicyStage.batch

    def interrupted(stage, seed, step, size):
        if step == 3:
            raise KeyboardInterrupt
        return whole(stage, seed, step, size)

    with monkeypatch.context() as patch:
        patch.setattr(policy._PolicyStage, "batch", interrupted)
        said = worldline(*command)
    assert said.code == 130 and "the same command goes on" in said.err and "Traceback" not in said.err
    assert worldline(*command).code == 0
    assert json.loads((out / "config.json").read_text())["provenance"]["steps"] == 6
