"""Data that worldline did not record: plain LeRobot folders, absolute actions, no pose, other extremes, other content at the same path."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainers.test_stages import EYES, loop, world_model_config
from tests.trainers.test_video_action import config as video_action_config
from tests.trainers.toy import dot_episode, write_dots
from worldline import checkpoint
from worldline.data import LeRobotDataset, write_dataset
from worldline.errors import CheckpointError, DatasetError, SpecMismatch
from worldline.eval.replays import load_replays, open_for, within_range
from worldline.policies import ClonedPolicy, PolicyConfig
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer
from worldline.tokenizers import load_tokenizer
from worldline.trainers import inputs, policy, scorer, tokenizer, video_action, world_model, world_model_edm
from worldline.trainers.inputs import FrameBatches, frame_weights, open_datasets
from worldline.types import CameraSpec
from worldline.worldmodels import EDMConfig, load_world_model


def without_extras(root: Path) -> Path:
    """The folder as another tool would have written it: no spec, no split, and no word on success but `next.success`."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    del info["worldline"]
    path.write_text(json.dumps(info))
    return root


def small_world_model(data: tuple[Path, ...], eyes: Path, out: Path, **options) -> world_model.TrainWorldModel:
    return replace(world_model_config(data[0], eyes, out, loop=loop(2, batch_size=4)), data=data, **options)


def test_absolute_actions_learn_from_their_own_dreams(patches, tmp_path):
    """There is no aim to follow where actions are absolute."""
    data = without_extras(write_dots(tmp_path / "plain", episodes=12))
    assert LeRobotDataset(data).spec.action.kind == "absolute"
    settings = small_world_model((data,), patches, tmp_path / "wm")
    world_model.run(replace(settings, model=replace(settings.model, own_history=0.9)), progress=False)
    assert load_world_model(tmp_path / "wm")[0].spec.action.kind == "absolute"


@pytest.fixture(scope="module")
def poseless(tmp_path_factory) -> Path:
    """Video and actions, and nothing about where the robot is."""
    root = tmp_path_factory.mktemp("poseless") / "data"
    episodes = [dot_episode(i, expert=i % 2 == 0) for i in range(12)]
    spec = replace(episodes[0].spec, pose_names=())
    return write_dataset(root, (replace(e, spec=spec, poses=torch.zeros(len(e.poses), 0)) for e in episodes))


@pytest.mark.parametrize("kind", ["transformer", "u-net", "uwm", "uva"])
def test_a_robot_that_tells_no_pose_has_world_models(kind, poseless, patches, tmp_path):
    out = tmp_path / "wm"
    if kind == "transformer":
        world_model.run(small_world_model((poseless,), patches, out), progress=False)
    elif kind == "u-net":
        model = EDMConfig(block_out_channels=(16, 16), pose_width=16, norm_groups=4)
        settings = world_model_edm.TrainWorldModelEDM(
            data=(poseless,), tokenizer=patches, out=out, model=model, loop=loop(2, batch_size=4)
        )
        world_model_edm.run(settings, progress=False)
    else:
        video_action.run(video_action_config(poseless, patches, out, design=kind, steps=2), progress=False)
    model, eyes = load_world_model(out)
    dataset, _ = open_for(model.spec, poseless)
    replays = load_replays(dataset, [0, 1], cameras=["top"], frames=4)
    assert replays.poses.shape == (2, 4, 0)
    clip = world_model.Clip(frames=eyes.encode({"top": replays.frames["top"][:, :1]}), poses=replays.poses[:, :1],
                            actions=replays.actions[:, :0], instruction=replays.instruction)  # fmt: skip
    _, made = model.imagine(model.observe(clip), replays.actions[:, : model.spec.chunk], seeds=torch.arange(2))
    assert made.latents["top"].isfinite().all() and made.poses.shape[2] == 0


def test_a_robot_that_tells_no_pose_is_cloned(poseless, tmp_path):
    settings = {"policy": PolicyConfig(chunk=4, hidden=8, encoder=EYES), "loop": loop(2, batch_size=4)}
    policy.run(
        policy.TrainPolicy(data=(poseless,), out=tmp_path / "bc", demonstrations="all", **settings), progress=False
    )
    assert ClonedPolicy.from_pretrained(tmp_path / "bc").spec.pose_names == ()


def test_recordings_of_one_robot_reach_other_extremes_and_go_together(patches, tmp_path):
    few, many = (
        without_extras(
            write_dataset(tmp_path / name, (dot_episode(i, expert=i % 2 == 0) for i in numbers), split_seed=9)
        )
        for name, numbers in (("few", range(40, 52)), ("many", range(12)))
    )
    one, other = (LeRobotDataset(root).spec.action for root in (few, many))
    assert one.low != other.low and LeRobotDataset(few).range_observed
    both = [s.spec.action for s in open_datasets((few, many), "train")]
    assert (
        both[0] == both[1]
        and both[0].low == tuple(map(min, one.low, other.low))
        and both[0].high == tuple(map(max, one.high, other.high))
    )
    world_model.run(small_world_model((few, many), patches, tmp_path / "wm"), progress=False)
    spec = load_world_model(tmp_path / "wm")[0].spec
    assert spec.action == both[0]
    dataset, _ = open_for(spec, few)  # a test set by itself
    assert dataset.spec.action == spec.action
    declared = write_dots(tmp_path / "declared", episodes=4)  # says what its actions may be, and what they are
    with pytest.raises(SpecMismatch, match=r"action\.kind"):
        open_datasets((few, declared), "all")
    absolute = LeRobotDataset(few, action_range=([-2.0] * 4, [2.0] * 4))
    assert absolute.spec.action.low == (-2.0,) * 4 and not absolute.range_observed


def test_actions_beyond_what_a_model_knows_are_named(tmp_path):
    few = without_extras(write_dataset(tmp_path / "few", (dot_episode(i, expert=True) for i in range(4)), split_seed=9))
    spec = LeRobotDataset(few).spec
    dataset, _ = open_for(replace(spec, action=replace(spec.action, high=(0.1,) * 4)), few)
    replays = load_replays(dataset, [0], cameras=["top"], frames=4)
    with pytest.raises(DatasetError, match="within their range"):
        within_range(replays, dataset.spec.action, clip=False)
    assert within_range(replays, dataset.spec.action, clip=True).actions.max() <= 0.1


def test_next_success_says_which_episodes_succeeded(tmp_path):
    data = without_extras(write_dots(tmp_path / "plain", episodes=12))
    table = data / "meta/episodes/chunk-000/file-000.parquet"
    import pandas as pd

    rows = pd.read_parquet(table)
    rows.drop(columns=["success", "terminated", "truncated", "initial_success"]).to_parquet(table)
    dataset = LeRobotDataset(data)
    seen = [bool(dataset.episode(i).frame_success.any()) for i in range(12)]
    assert [dataset.success(i) for i in range(12)] == seen and any(seen) and not all(seen)
    assert dataset.episode(0).provenance["scorer"] == "dataset column next.success"


def test_other_data_at_the_same_path_is_another_run(dots, patches, tmp_path):
    data = Path(shutil.copytree(dots, tmp_path / "data"))
    settings = small_world_model((data,), patches, tmp_path / "wm")
    world_model.run(settings, progress=False)
    shutil.rmtree(data)
    write_dots(data, episodes=14)
    before = checkpoint.load_config(tmp_path / "wm", part="world-model")["provenance"]["dataset_fingerprints"]
    with pytest.raises(CheckpointError, match=r"what .*data holds: was"):
        world_model.run(settings, progress=False)
    assert checkpoint.load_config(tmp_path / "wm", part="world-model")["provenance"]["dataset_fingerprints"] == before


def test_a_tokenizer_with_another_weight_of_motion_is_another_run(dots, tmp_path):
    settings = tokenizer.TrainTokenizer(data=(dots,), out=tmp_path / "tok", kind="patches", patch=8)
    tokenizer.run(settings, progress=False)
    with pytest.raises(CheckpointError, match=r"motion_weight: was 6\.0, is now 0"):
        tokenizer.run(replace(settings, motion_weight=0.0), progress=False)


def test_a_copy_of_what_was_observed_is_still_that(tmp_path):
    few = LeRobotDataset(without_extras(write_dots(tmp_path / "few", episodes=12)))
    every = [few.episode(i) for i in range(12)]
    copied = LeRobotDataset(write_dataset(tmp_path / "copy", every, like=few))
    assert copied.range_observed and copied.split("held-out") == few.split("held-out")
    assert not LeRobotDataset(write_dataset(tmp_path / "told", every)).range_observed
    wider = replace(few.spec, action=replace(few.spec.action, high=(3.0,) * 4))
    assert open_for(wider, copied.root)[0].spec.action.high == (3.0,) * 4  # a model of more recordings


def test_a_unified_model_with_nothing_to_imitate_is_refused(patches, tmp_path):
    data = write_dataset(tmp_path / "failures", (dot_episode(i, expert=False) for i in range(12)), split_seed=9)
    settings = video_action_config(data, patches, tmp_path / "va", steps=2, demonstrations="success")
    with pytest.raises(DatasetError, match=r"episodes to imitate \(success\) required, got none"):
        video_action.run(settings, progress=False)
    forward = replace(settings, model=replace(settings.model, shares={"forward": 1.0}))
    video_action.run(forward, progress=False)


@pytest.fixture(scope="module")
def two_views(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("views") / "data"
    episodes = [dot_episode(i, expert=i % 2 == 0) for i in range(16)]
    spec = replace(episodes[0].spec, cameras=(*episodes[0].spec.cameras, CameraSpec(name="side", height=8, width=24)))
    side = torch.zeros(len(episodes[0].poses), 3, 8, 24, dtype=torch.uint8)
    return write_dataset(
        root, (replace(e, spec=spec, frames={**e.frames, "side": side}) for e in episodes), split_seed=9
    )


def test_what_goes_with_a_world_model_of_one_camera_sees_that_camera(two_views, tmp_path):
    eyes = tokenizer.run(
        tokenizer.TrainTokenizer(data=(two_views,), out=tmp_path / "tok", kind="patches", patch=4, cameras=("top",)),
        progress=False,
    )
    sees = SuccessConfig(encoder=replace(EYES, window=2), hidden=8)
    options = {"scorer": sees, "loop": loop(3, batch_size=2)}  # of two rows often none is shown through the tokenizer
    scorer.run(
        scorer.TrainScorer(data=(two_views,), out=tmp_path / "success", tokenizer=eyes, **options), progress=False
    )
    cloning = {
        "policy": PolicyConfig(chunk=4, hidden=8, encoder=EYES),
        "loop": loop(2, batch_size=4),
        "cameras": ("top",),
    }
    policy.run(
        policy.TrainPolicy(data=(two_views,), out=tmp_path / "bc", demonstrations="all", **cloning), progress=False
    )
    seen = [c.name for c in SuccessScorer.from_pretrained(tmp_path / "success").spec.cameras]
    assert seen == [c.name for c in ClonedPolicy.from_pretrained(tmp_path / "bc").spec.cameras] == ["top"]
    assert [c.name for c in load_tokenizer(eyes).cameras] == ["top"]


@pytest.mark.parametrize("seed", range(6))
def test_no_row_through_the_tokenizer_is_no_error(seed, patches):
    frames = {"top": torch.zeros(1, 6, 16, 16, dtype=torch.uint8)}
    shown = scorer.half_reconstructed(load_tokenizer(patches), frames, torch.Generator().manual_seed(seed))
    assert shown["top"].shape == frames["top"].shape


def test_images_are_drawn_from_each_dataset_by_its_frames_and_backgrounds_are_not_hoarded(dots, monkeypatch):
    selections = [*open_datasets((dots,), "all"), *open_datasets((dots,), "all", max_episodes=1)]
    (camera,) = selections[0].spec.cameras
    monkeypatch.setattr(inputs, "MEDIAN_BYTES", 3 * 3 * camera.height * camera.width)
    batches = FrameBatches(selections, motion_weight=6.0, frames_per_episode=1)
    drawn = []
    for which, s in enumerate(selections):
        rows = s.store.rows
        s.store.rows = lambda *key, which=which, rows=rows: drawn.append(which) or rows(*key)
    images, weights = batches.batch(0, 0, 200)
    assert images.shape[0] == weights.shape[0] == 200 and len(batches._median) <= 3
    share = float(frame_weights(selections)[1] / frame_weights(selections).sum())
    first = [which for which in drawn if which == 1]
    assert share < 0.2 and len(first) / len(drawn) < 2 * share + 0.1


def test_of_data_too_large_for_memory_little_is_decoded(dots, monkeypatch):
    """Frames drawn are the same, whether all are kept in memory or none."""
    from worldline.data.video import VideoFrames
    from worldline.trainers.policy import chunks
    from worldline.trainers.samples import SampleDraw

    def draw(fits: bool):
        selections = open_datasets((dots,), "train")
        for s in selections:
            s.store.fits = fits
        return SampleDraw(selections, chunks(4), window=2).batch(0, 0, 8), FrameBatches(selections, motion_weight=6.0)

    kept, batches = draw(True)
    decoded, read = [], VideoFrames.__getitem__
    monkeypatch.setattr(
        VideoFrames, "__getitem__", lambda self, key: decoded.append(len(got := read(self, key))) or got
    )
    few, _ = draw(False)
    assert torch.equal(few.observation.images["top"], kept.observation.images["top"])
    assert sum(decoded) <= 8 * 2
    images, weights = batches.batch(0, 0, 5)
    again, same = draw(False)[1].batch(0, 0, 5)
    assert torch.equal(images, again) and torch.equal(weights, same)
