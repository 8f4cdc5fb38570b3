"""A unified video-action model through the command line: trained with and without actions, asked by mode, ranked, refined in, acting."""

import json
from pathlib import Path

import pytest
import torch

from tests.commands.conftest import Lab, Run, do, record
from tests.commands.test_all_verbs import results
from tests.commands.test_refine import SMALL
from worldline.commands.acting import load_acting
from worldline.commands.asking import gone_on
from worldline.commands.rollouts import identity_of
from worldline.data import LeRobotDataset
from worldline.policies import SteeredPolicy, VideoActionPolicy, load_policy
from worldline.rl_in_imagination.planning import BestOfN
from worldline.types import Clip
from worldline.worldmodels import VideoActionModel, load_world_model

TRAIN = ["--max-steps", 3, "--loop.batch-size", 4, "--loop.warmup", 1, "--model.trunk.width", 16, "--model.trunk.depth", 1,
         "--model.trunk.heads", 2, "--model.trunk.patch", 1, "--model.horizon", 2, "--model.head-width", 16,
         "--model.head-depth", 1, "--model.solver-steps", 2]  # fmt: skip


@pytest.fixture(scope="module")
def video(lab: Lab) -> Path:
    """Episodes that carry no actions."""
    out = lab.root / "video"
    record(out, 8, "--without-actions", True, "--seed", 5)
    return out


@pytest.fixture(scope="module", params=["uwm", "uva"])
def va(request, lab: Lab, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "va"
    do("train", "video-action", "--data", lab.data, video, "--tokenizer", lab.tok, "--out", out, "--model.design",
       request.param, *TRAIN)  # fmt: skip
    return out


def test_the_checkpoint_says_what_it_is(va: Path, video: Path, worldline: Run) -> None:
    model, tokenizer = load_world_model(va)
    assert isinstance(model, VideoActionModel) and model.latent_spec == tokenizer.latent_spec
    shown = json.loads(worldline("show", va).out)
    assert shown["kind"] == "video-action" and str(video) in shown["provenance"]["data"]
    assert {"error_vs_copy", "shuffled_vs_true", "policy_error", "inverse_error"} <= set(shown["provenance"])
    assert isinstance(load_policy(f"{va}@steps=1,execute=1,warm=0.5", spec=model.spec), VideoActionPolicy)


def test_as_a_world_model(va: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    judges = ["--world-model", va, "--scorer", lab.scorer, "--data", lab.data]
    out = tmp_path / "report"
    said = worldline("eval", "--world-model", va, "--data", lab.data, "--split", "all", "--max-episodes", 2, "--frames", 4,
                     "--videos", 0, "--out", out)  # fmt: skip
    assert said.code == 0, said.err
    assert results(out, videos=False)["protocol"]["used"]["chunk"] == 1
    refining = ["refine", "--policy", lab.bc, *judges, "--out", tmp_path / "refined", *SMALL, "--rl.iterations", 1]
    assert worldline(*refining, "--videos", 0).code == 0


def test_imagine_asks_by_mode(va: Path, video: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for mode in ("forward", "policy", "inverse", "video", "joint"):
        out = tmp_path / f"{mode}.mp4"
        watch = ["imagine", "--world-model", va, "--episode", 1, "--mode", mode, "--frames", 6, "--out", out]
        said = worldline(*watch, "--data", lab.data)
        assert said.code == 0 and out.is_file(), said.err
        assert out.with_suffix(".png").is_file() == (mode in ("policy", "inverse", "joint"))
        of_video = worldline(*watch, "--data", video)
        if mode == "forward":
            assert of_video.code == 2 and "are video alone" in of_video.err
        else:
            assert of_video.code == 0, of_video.err
    guided = ["imagine", "--world-model", va, "--episode", 1, "--frames", 6, "--data", lab.data, "--guide", lab.bc]
    said = worldline(*guided, "--mode", "joint", "--guide-coefficient", 0.5, "--out", tmp_path / "guided.mp4")
    assert said.code == 0 and (tmp_path / "guided.png").is_file(), said.err
    said = worldline(*guided, "--mode", "policy", "--out", tmp_path / "o.mp4")
    assert said.code == 2 and "--guide is for --mode joint" in said.err
    said = worldline("imagine", "--world-model", lab.wm, "--data", lab.data, "--episode", 0, "--mode", "joint", "--out",
                     tmp_path / "o.mp4")  # fmt: skip
    assert said.code == 2 and "--mode joint: a unified video-action model is required" in said.err


def test_as_a_policy(va: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    said = worldline(
        "rank", "--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data, "--policies", va, f"{va}@steps=1,warm=0.5",
        lab.bc, "--imagined-episodes", 2, "--frames", 4, "--videos", 0, "--out", tmp_path / "rank",
    )  # fmt: skip
    assert said.code == 0, said.err
    out = tmp_path / "refined"
    said = worldline("refine", "--policy", va, "--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data, "--out", out,
                     *SMALL, "--rl.iterations", 1, "--videos", 0)  # fmt: skip
    assert said.code == 0, said.err
    assert isinstance(load_policy(str(out), spec=load_world_model(lab.wm)[0].spec), SteeredPolicy)


def test_video_alone_is_refused_where_actions_are_needed(video: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    dataset = LeRobotDataset(video)
    assert not dataset.acts(0) and dataset.episode(0).actions.isnan().all()
    for command in (
        ["train", "policy", "--data", video, "--demonstrations", "all"],
        ["train", "world-model", "--data", video, "--tokenizer", lab.tok],
        ["eval", "--world-model", lab.wm, "--data", video],
    ):
        said = worldline(*command, "--out", tmp_path / "out")
        assert said.code == 2 and "are video alone" in said.err and "episodes with actions are required" in said.err
    said = worldline("train", "video-action", "--data", video, "--tokenizer", lab.tok, "--out", tmp_path / "va", *TRAIN)
    assert said.code == 2 and "some episodes with actions required, got video alone" in said.err
    assert not (tmp_path / "va").exists()


def test_two_stages(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    base = ["train", "video-action", "--data", lab.data, "--tokenizer", lab.tok, "--model.design", "uva", *TRAIN]
    assert worldline(*base, "--stage", "video", "--out", tmp_path / "first").code == 0
    said = worldline("rank", "--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data, "--policies",
                     tmp_path / "first", lab.bc, "--out", tmp_path / "rank")  # fmt: skip
    assert said.code == 2 and "that learned to act is required" in said.err
    assert worldline(*base, "--init-from", tmp_path / "first", "--out", tmp_path / "second").code == 0
    said = worldline(*base, "--init-from", tmp_path / "first", "--model.horizon", 3, "--out", tmp_path / "third")
    assert said.code == 2 and "model.horizon: 2 required, got 3" in said.err


def test_options_that_it_does_not_have(va: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for options, expected in (
        ("speed=2", "steps=N, execute=BLOCKS and warm=LEVEL required after '@', got 'speed=2'"),
        ("execute=3", "execute: from 0 to 2 blocks"),
        ("warm=2", "warm_level must be above 0 and at most 1, got 2"),
    ):
        said = worldline("rank", "--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data, "--policies",
                         f"{va}@{options}", lab.bc, "--out", tmp_path / "rank")  # fmt: skip
        assert said.code == 2 and expected in said.err, said.err


def test_planning_is_one_more_policy_by_name(va: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    """In its own dream, or of any policy in a named one; kept rollouts are those of this scorer."""
    judges = [
        "--world-model",
        lab.wm,
        "--scorer",
        lab.scorer,
        "--data",
        lab.data,
        "--frames",
        4,
        "--imagined-episodes",
        3,
    ]
    planned = [
        f"{va}@best=2,beyond=1,scorer={lab.scorer}",
        f"{lab.bc}@best=2,spread=0.5,scorer={lab.scorer},dream={lab.wm}",
    ]
    said = worldline("rank", *judges, "--out", tmp_path / "rank", "--policies", lab.bc, va, *planned, "--videos", 0)
    assert said.code == 0, said.err
    found = results(tmp_path / "rank", videos=False)
    names = {row["policy"] for row in found["policies"]}
    # it pleases its own judges
    flattered = [said for said in found["independence"] if "its imagined success flatters it" in said]
    assert len(flattered) == 2 and "plans with the scorer of this ranking" in flattered[0]
    assert "plans with the world model and the scorer of this ranking" in flattered[1]
    assert names == {"bc", "va", "va@best=2,beyond=1,scorer=scorer", "bc@best=2,spread=0.5,scorer=scorer,dream=wm"}
    plans = load_acting(planned[0], spec=load_world_model(va)[0].spec)
    assert isinstance(plans, BestOfN) and plans.candidates == 2 and plans.beyond == 1
    assert len(identity_of(planned[1], plans)) == 4
    for wrong, expected in (
        (f"{lab.bc}@best=2,scorer={lab.scorer}", "a policy that plans requires best=N, scorer=FOLDER and dream=FOLDER"),
        (f"{va}@scorer={lab.scorer}", "a policy that plans requires best=N"),
        (f"{va}@best=few,scorer={lab.scorer}", "a number required for best after '@', got 'best=few'"),
        (f"{va}@best=2,scorer={lab.scorer},noise=1", "a policy that is corrupted (noise, lag) cannot plan"),
        (f"{va}@best=2,scorer={lab.wm}", "a scorer is required here, this is a world-model"),
    ):
        said = worldline("rank", *judges, "--out", tmp_path / "wrong", "--policies", lab.bc, wrong)
        assert said.code == 2 and expected in said.err, said.err


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_a_longer_dream_goes_on_from_as_many_frames_as_the_model_looks_back_at(ahead: int) -> None:
    """Also where it imagines fewer at a time: those known before are kept."""

    def frames(poses: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"top": poses[..., None, None].expand(-1, -1, 3, 2, 2)}

    now = torch.zeros(1, 1, 1)
    seen = Clip(frames=frames(now), poses=now, actions=torch.zeros(1, 0, 2, 1), instruction=("go",))
    for i in range(1, 6):
        new = (i - 1) * ahead + torch.arange(1.0, ahead + 1)[None, :, None]
        seen = gone_on(seen, frames(new), new, 3)
        last, count = i * ahead, min(3, 1 + i * ahead)
        assert seen.poses.flatten().tolist() == [float(n) for n in range(last - count + 1, last + 1)]
        assert torch.equal(seen.frames["top"][:, :, 0, 0, 0], seen.poses[..., 0]) and seen.instruction == ("go",)
        assert seen.actions.shape == (1, count - 1, 2, 1)
