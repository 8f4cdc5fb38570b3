"""`posttrain` through the command line: a world model in, one out; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import Lab, Run, do, record
from tests.commands.dots import WORLD
from tests.commands.test_all_verbs import results
from tests.commands.test_label import LOOP
from tests.commands.test_video_action import TRAIN
from worldline.worldmodels import VideoActionModel, load_world_model

RL = ["--rl.iterations", 2, "--rl.check-every", 1, "--rl.check-clips", 4, "--rl.grpo.contexts", 2, "--rl.grpo.group", 2,
      "--rl.grpo.frames", 3, "--videos", 1]  # fmt: skip

UNIFIED = [*TRAIN, "--model.chunk", 2, "--model.solver-steps", 4]


@pytest.fixture(scope="module")
def home(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("posttrain")
    record(out / "data", 24, "--horizon", 40, "--control-steps", 2)
    data = ["--data", out / "data", "--tokenizer", lab.tok, "--max-steps", 20]
    for name, half, more in (
        (
            "reward",
            "first",
            ["--hidden", 32, "--encoder.channels", 8, 8, "--encoder.features", 16, "--encoder.size", 16],
        ),
        ("judge", "second", ["--architecture", "transformer"]),
    ):
        do("train", "inverse", *data, "--half", half, "--out", out / name, *more, *LOOP)
    do("train", "world-model", "--data", out / "data", "--tokenizer", lab.tok, "--out", out / "wm", "--max-steps", 4, "--frames", 4,
       "--model.network.window", 4, "--model.network.width", 32, "--model.network.depth", 1, "--model.network.heads", 2,
       "--loop.warmup", 1, "--loop.batch-size", 4)  # fmt: skip
    return out


def command(home: Path, out: Path, **changes: object) -> list[object]:
    flags = {
        "world_model": home / "wm",
        "reward": home / "reward",
        "judge": home / "judge",
        "data": home / "data",
    } | changes
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["posttrain", *words, "--out", out, *RL]


def test_a_world_model_goes_in_and_one_comes_out(home: Path, worldline: Run, tmp_path: Path) -> None:
    run = [*command(home, tmp_path / "out"), "--override-audit", "True"]
    said = worldline(*run)
    assert said.code == 0, said.err
    found = results(tmp_path / "out", videos=True)
    assert [c["iteration"] for c in found["checks"]] == [0, 1, 2] and len(found["history"]) == 2
    assert set(found["checks"][0]) >= {"reward", "judge", "ceiling", "moved_psnr", "frechet"}
    model, tokenizer = load_world_model(tmp_path / "out")
    assert model.latent_spec == tokenizer.latent_spec
    for name, audit in found["audits"].items():
        assert audit["thresholds"] == {"exact": 0.5, "bad": 0.2} and audit["tokenizer"] == tokenizer.fingerprint
        assert not any(sentence.startswith("tokenizer: an audit") for sentence in found["audit_failures"][name])
    assert "Audits of the inverse models" in (tmp_path / "out" / "report.html").read_text()
    again = worldline(*run)  # it is done: nothing is trained, the report is the same
    assert again.code == 0 and results(tmp_path / "out", videos=True) == found
    changed = worldline(*run, "--rl.grpo.lr", 0.1)
    assert changed.code == 2 and "rl" in changed.err


def test_a_run_does_not_go_on_with_other_data_at_the_same_path(home: Path, worldline: Run, tmp_path: Path) -> None:
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    run = [*command(home, tmp_path / "out", data=data), "--override-audit", "True", "--videos", 0, "--rl.iterations"]
    assert worldline(*run, 1).code == 0
    shutil.rmtree(data)
    record(data, 24, "--horizon", 40, "--control-steps", 2, "--seed", 7)
    said = worldline(*run, 2)
    assert said.code == 2 and "holds a run with other settings" in said.err, said.err
    assert f"what {data} holds: was" in " ".join(said.err.split())


def test_video_alone_has_no_actions_to_follow(home: Path, worldline: Run, tmp_path: Path) -> None:
    record(tmp_path / "video", 24, "--horizon", 40, "--control-steps", 2, "--without-actions", "True")
    said = worldline(*command(home, tmp_path / "out", data=tmp_path / "video"), "--override-audit", "True")
    assert said.code == 2 and "episodes with actions are required" in said.err, said.err
    assert not (tmp_path / "out").exists()


def test_episodes_too_short_for_a_check_are_told_the_protocol_and_not_flags_of_other_verbs(
    home: Path, lab: Lab, worldline: Run, tmp_path: Path
) -> None:
    run = [*command(home, tmp_path / "out", data=lab.data), "--override-audit", "True"]
    said = worldline(*run)  # episodes of 11 frames
    words = " ".join(said.err.split())
    assert said.code == 2 and "episodes of at least 16 frames required for clips of 16 at stride 1" in words, said.err
    assert "Checks take clips of 16 frames (the evaluation protocol's 16, or more to hold --rl.grpo.prefix" in words
    assert "--frames" not in words and "--stride" not in words
    said = worldline(*run, "--rl.grpo.frames", 30)
    assert (
        "episodes of at least 31 frames required" in " ".join(said.err.split()) and "fewer --rl.grpo.frames" in said.err
    )
    said = worldline(*run, "--rl.grpo.prefix", 28)
    assert "episodes of at least 32 frames required" in " ".join(said.err.split()) and "or --rl.grpo.prefix" in said.err
    assert not (tmp_path / "out").exists()


def test_both_models_rank_the_same_policies(home: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    policies = ["tests.commands.dots:runner", "tests.commands.dots:idler", "tests.commands.dots:mixed"]
    asked = ["--ranking.policies", *policies, "--ranking.scorer", lab.scorer, "--ranking.truth", WORLD, "--ranking.episodes", 4,
             "--ranking.horizon", 20, "--ranking.processes", 0]  # fmt: skip
    run = [*command(home, tmp_path / "out"), "--override-audit", "True", "--videos", 0, "--rl.iterations", 1]
    said = worldline(*run, *asked)
    assert said.code == 0, said.err
    change = results(tmp_path / "out", videos=False)["ranking"]
    before, after = (results(tmp_path / "out" / "ranking" / name) for name in ("before", "after"))
    assert before["change"] is None and after["change"] == change and change["episodes"] == 4
    assert before["outcomes"]["true"] == after["outcomes"]["true"]
    assert change["measures"]["bias"]["after"] == pytest.approx(after["statistics"]["bias"])
    fresh = [*command(home, tmp_path / "fresh"), "--override-audit", "True", *asked]
    for wrong, reason in (
        (["--ranking.policies", *policies[:2], "nowhere"], "policy required: no folder nowhere"),
        (["--ranking.truth", "drawer"], "world required"),
    ):  # before post-training, not after it
        said = worldline(*fresh, *wrong)
        assert said.code == 2 and reason in said.err and not (tmp_path / "fresh").exists()
    said = worldline(
        *run, "--ranking.policies", *policies[:2], "--ranking.scorer", lab.scorer, "--ranking.truth", WORLD
    )
    assert said.code == 2 and "at least three --ranking.policies" in " ".join(said.err.split())


def test_a_unified_model_is_post_trained_too_by_adapters(home: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    data = ["--data", home / "data", "--tokenizer", lab.tok]
    for design in ("uwm", "uva"):
        do("train", "video-action", *data, "--out", tmp_path / design, "--model.design", design, *UNIFIED)
    run = [
        *command(home, tmp_path / "out", world_model=tmp_path / "uwm"),
        "--override-audit",
        "True",
        "--rl.grpo.lora-rank",
        2,
    ]
    said = worldline(*run, "--rl.grpo.frames", 3)
    assert said.code == 2 and "whole chunks of 2 frames are required by this world model, got 3" in said.err
    said = worldline(*run, "--rl.grpo.frames", 4, "--rl.grpo.prefix", 3)
    assert "--rl.grpo.prefix: whole chunks of 2 frames are required by this world model, got 4 and 3" in " ".join(
        said.err.split()
    )
    said = worldline(*run, "--rl.grpo.frames", 4, "--rl.grpo.explore", 0.4)
    assert said.code == 2 and "--rl.grpo.explore: an autoregressive world model is required" in said.err
    assert not (tmp_path / "out").exists()  # the folder is free for the command as it should be
    said = worldline(*run, "--rl.grpo.frames", 4, "--rl.grpo.prefix", 2)
    assert said.code == 0, said.err
    assert len(results(tmp_path / "out", videos=True)["history"]) == 2
    model, _ = load_world_model(tmp_path / "out")
    assert isinstance(model, VideoActionModel)
    said = worldline(*command(home, tmp_path / "other", world_model=tmp_path / "uva"), "--override-audit", "True")
    assert said.code == 2 and "design uwm is required" in said.err and not (tmp_path / "other").exists()


def test_what_is_refused(home: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    said = worldline(*command(home, tmp_path / "out"))
    assert said.code == 2 and "passed its audit is required" in said.err
    shutil.copytree(home / "reward", tmp_path / "untried")  # passed, but never tried on what a tokenizer shows
    about = json.loads((tmp_path / "untried" / "config.json").read_text())
    about["provenance"]["audit"] |= {"failures": [], "tokenizer": None}
    (tmp_path / "untried" / "config.json").write_text(json.dumps(about))
    said = worldline(*command(home, tmp_path / "out", reward=tmp_path / "untried"))
    _, tokenizer = load_world_model(home / "wm")
    words = (
        f"this one did not: tokenizer: an audit through the world model's tokenizer {tokenizer.fingerprint} is required"
    )
    assert said.code == 2 and words in " ".join(said.err.split())
    override = ["--override-audit", "True"]
    said = worldline(*command(home, tmp_path / "out", judge=home / "reward"), *override)
    assert said.code == 2 and "two architectures are required" in said.err
    said = worldline(*command(home, tmp_path / "out"), *override, "--rl.grpo.group", 1)
    assert said.code == 2 and "groups of at least 2 rows required" in " ".join(said.err.split())
    said = worldline(*command(home, tmp_path / "out"), *override, "--rl.grpo.solver-steps", 1)
    assert said.code == 2 and "at least 4 solver steps are required" in " ".join(said.err.split())
    said = worldline(*command(home, tmp_path / "out", reward=lab.scorer), *override)
    assert said.code == 2 and "an inverse is required here, this is a scorer" in said.err
    assert not (tmp_path / "out").exists()
