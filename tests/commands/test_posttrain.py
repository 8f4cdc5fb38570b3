"""`posttrain` through the command line: a world model in, one out; and what is refused."""

from pathlib import Path

import pytest

from tests.commands.conftest import Lab, Run, do, record
from tests.commands.test_all_verbs import results
from tests.commands.test_label import LOOP
from worldline.worldmodels import load_world_model

RL = ["--rl.iterations", 2, "--rl.check-every", 1, "--rl.check-clips", 4, "--rl.grpo.contexts", 2, "--rl.grpo.group", 2,
      "--rl.grpo.frames", 3, "--videos", 1]  # fmt: skip


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
    again = worldline(*run)  # it is done: nothing is trained, the report is the same
    assert again.code == 0 and results(tmp_path / "out", videos=True) == found
    changed = worldline(*run, "--rl.grpo.lr", 0.1)
    assert changed.code == 2 and "rl" in changed.err


def test_what_is_refused(home: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    said = worldline(*command(home, tmp_path / "out"))
    assert said.code == 2 and "passed its audit is required" in said.err
    override = ["--override-audit", "True"]
    said = worldline(*command(home, tmp_path / "out", judge=home / "reward"), *override)
    assert said.code == 2 and "two architectures are required" in said.err
    said = worldline(*command(home, tmp_path / "out"), *override, "--rl.grpo.group", 1)
    assert said.code == 2 and "groups of at least 2 rows required" in " ".join(said.err.split())
    said = worldline(*command(home, tmp_path / "out"), *override, "--rl.grpo.solver-steps", 1)
    assert said.code == 2 and "at least 4 solver steps are required" in " ".join(said.err.split())
    said = worldline(*command(home, tmp_path / "out", reward=lab.scorer), *override)
    assert said.code == 2 and "a inverse is required here, this is a scorer" in said.err
    assert not (tmp_path / "out").exists()
