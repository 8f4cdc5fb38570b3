"""The EDM U-Net through the command line: trained, shown, dreamt, measured, ranked and refined with like the other kind."""

import json
from pathlib import Path

import pytest

from tests.commands.conftest import Lab, Run, do
from tests.commands.test_all_verbs import results
from tests.commands.test_refine import SMALL
from worldline.worldmodels import EDMWorldModel, load_world_model

TRAIN = ["--max-steps", 2, "--frames", 5, "--loop.batch-size", 2, "--loop.warmup", 1, "--model.block-out-channels", 16, 16,
         "--model.pose-width", 16, "--model.solver-steps", 2]  # fmt: skip


@pytest.fixture(scope="module")
def edm(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edm") / "wm"
    do("train", "world-model-edm", "--data", lab.data, "--tokenizer", lab.tok, "--out", out, *TRAIN)
    return out


def test_the_checkpoint_says_what_it_is(edm: Path, worldline: Run) -> None:
    model, tokenizer = load_world_model(edm)
    assert isinstance(model, EDMWorldModel) and model.latent_spec == tokenizer.latent_spec
    shown = json.loads(worldline("show", edm).out)
    assert shown["part"] == "world-model" and shown["kind"] == "edm-unet" and shown["weights"] > 0
    assert {"error_vs_copy", "shuffled_vs_true"} <= set(shown["provenance"])


def test_imagine_and_eval(edm: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    video = tmp_path / "out.mp4"
    said = worldline("imagine", "--world-model", edm, "--data", lab.data, "--episode", 1, "--frames", 4, "--out", video)
    assert said.code == 0 and video.is_file(), said.err
    out, free = tmp_path / "report", tmp_path / "free"
    said = worldline("train", "world-model", "--data", lab.data, "--tokenizer", lab.tok, "--out", free, "--max-steps", 1,
                     "--frames", 4, "--model.network.window", 4, "--model.network.width", 32, "--model.network.depth", 1,
                     "--model.network.heads", 2, "--model.network.actions", False, "--loop.warmup", 1)  # fmt: skip
    assert said.code == 0, said.err
    said = worldline("eval", "--world-model", edm, "--data", lab.data, "--split", "all", "--max-episodes", 2, "--frames", 4,
                     "--solver-steps", 1, "--action-free", free, "--videos", 0, "--out", out)  # fmt: skip
    assert said.code == 0, said.err
    protocol = results(out, videos=False)["protocol"]
    used = {"solver_steps": 1, "churn": 0.0, "sigma_max": 10.0, "sigma_min": 0.004}
    assert protocol["used"] == {"frames": 4, "episodes": 2, **used, "seed": 0}
    assert protocol["deviations"][0] == "solver_steps is not the checkpoint's own"


def test_rank_and_refine(edm: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    judges = ["--world-model", edm, "--scorer", lab.scorer, "--data", lab.data]
    ranking = ["rank", *judges, "--policies", lab.bc, lab.other, "--imagined-episodes", 2, "--frames", 3, "--videos", 0]
    assert worldline(*ranking, "--out", tmp_path / "rank").code == 0
    refining = ["refine", "--policy", lab.bc, *judges, "--out", tmp_path / "refined", *SMALL, "--rl.iterations", 1]
    assert worldline(*refining, "--videos", 0).code == 0


def test_what_it_cannot_do_is_refused_by_name(edm: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    watch = ["imagine", "--world-model", edm, "--data", lab.data, "--episode", 0, "--out", tmp_path / "out.mp4"]
    train = ["train", "world-model-edm", "--data", lab.data, "--tokenizer", lab.tok, "--out", tmp_path / "wm"]
    other = ["train", "world-model", *train[2:], "--init-from", edm, "--frames", 4, "--model.network.window", 4]
    for command, *parts in (
        ([*watch, "--history-level", 0.1, "--guidance", 2], "--history-level, --guidance: the EDMWorldModel in", "--solver-steps"),
        ([*watch, "--cache-write", "last-step"], "--cache-write: the EDMWorldModel in", "has no such setting"),
        ([*watch, "--actions", "none"], "requires actions: it never learned", "world-model --model.actionless"),
        ([*watch, "--instruction", "wave"], "trained without instructions", "--model.text hashed"),
        ([*train, "--frames", 4], "clips of at least as many frames as the window", "--frames 4", "--model.history, with the next"),
        ([*train, "--loop.optimizer", "muon"], "adamw required"),
        ([*train, "--model.sigma-max", 20], "asks for sigma 20, which training never shows"),
        (other, "a world model of kind autoregressive with weights of its own is required"),
    ):  # fmt: skip
        said = worldline(*command)
        told = " ".join(said.err.split())  # tyro wraps lines
        assert said.code == 2 and all(p in told for p in parts), said.err
        assert not (tmp_path / "wm").exists()


def test_help_names_the_stage(worldline: Run) -> None:
    assert "world-model-edm" in worldline("train", "--help").out
    told = worldline("train", "world-model-edm", "--help").out
    assert "--model.action-encoding" in told and "330M" in told
