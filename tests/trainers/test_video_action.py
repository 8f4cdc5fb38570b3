"""The stage of unified video-action models: what it learns with and without actions, and that it goes on as if never stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainers.test_stages import facts, loop
from tests.trainers.toy import dot_episode, write_dots
from worldline import checkpoint
from worldline.data import UNKNOWN, LeRobotDataset, write_dataset
from worldline.errors import WorldlineError
from worldline.trainers import video_action
from worldline.worldmodels.video_action import TrunkConfig, VideoActionConfig, VideoActionModel

MODEL = {
    "trunk": TrunkConfig(width=48, depth=2, heads=4, patch=1, registers=2),
    "horizon": 3,
    "head_width": 48,
    "head_depth": 2,
}


def config(
    dots: Path, patches: Path, out: Path, *, design: str = "uwm", steps: int = 4, **options
) -> video_action.TrainVideoAction:
    settings = {"lr": 2e-3, "batch_size": 8} | options.pop("loop", {})
    model = VideoActionConfig(design=design, **MODEL | options.pop("model", {}))
    return video_action.TrainVideoAction(
        data=(dots,), tokenizer=patches, out=out, model=model, loop=loop(steps, **settings), **options
    )


def test_it_learns_to_act_from_the_episodes_that_succeeded(dots, patches, tmp_path):
    """The dots' experts walk right; what failed is learned as video alone."""
    out = tmp_path / "run"
    shares = {"policy": 0.7, "forward": 0.3}
    video_action.run(
        config(
            dots,
            patches,
            out,
            design="uva",
            steps=160,
            demonstrations="success",
            model={"shares": shares},
            loop={"batch_size": 32},
        ),
        progress=False,
    )
    found = facts(out, "world-model")
    assert found["policy_error"] < 0.7 and found["error_vs_copy"] < 0.8 and found["shuffled_vs_true"] > 1.1


def test_failures_and_video_are_not_acted_on(dots, patches, tmp_path):
    settings = config(dots, patches, tmp_path / "run", demonstrations="success", video=(write_dots(tmp_path / "more"),))
    parts = video_action._parts(settings, "train", ["top"])
    dataset = LeRobotDataset(dots)
    won = [i for i in dataset.split("train") if dataset.episode(i).success]
    assert [(p.acted, p.imitated) for p in parts] == [(True, True), (True, False), (False, False)]
    first, second, _ = selections = [p.selection for p in parts]
    assert list(first.episodes) == won and sorted(first.episodes + second.episodes) == dataset.split("train")
    assert {s.dataset.root for s in video_action._datasets(selections)} == {dots, tmp_path / "more"}
    (part,) = video_action._parts(config(dots, patches, tmp_path / "run", stage="video"), "train", ["top"])
    assert not part.acted and list(part.selection.episodes) == dataset.split("train")


def test_a_batch_says_which_rows_may_be_asked_for_actions_and_video_takes_its_share(dots, patches, tmp_path):
    """However much video there is, of 600 clips about a fifth are video alone; so they are where it is told episode by episode."""
    from worldline.tokenizers import load_tokenizer

    episodes = [dot_episode(i, expert=i % 2 == 0) for i in range(40)]
    unknown = [replace(e, provenance={**e.provenance, "actions": UNKNOWN}) for e in episodes[8:]]
    write_dataset(tmp_path / "mixed", [*episodes[:8], *unknown], codec="libx264", crf=10, split_seed=9)
    options = {"frames": 4, "stride": 1, "device": "cpu", "progress": False}
    for settings in (
        config(dots, patches, tmp_path / "a", video=(write_dots(tmp_path / "more", episodes=90),), video_share=0.2),
        config(tmp_path / "mixed", patches, tmp_path / "b", video_share=0.2),
    ):
        parts = video_action._parts(settings, "train", ["top"])
        assert [p.acted for p in parts] == [True, False]
        batches = video_action._Batches(parts, load_tokenizer(patches), video_share=settings.video_share, **options)
        clip, acted, imitated = batches.batch(0, 3, 600)
        assert len(clip.poses) == 600 and torch.equal(acted, imitated) and 0.12 < 1 - acted.float().mean() < 0.28
        known = torch.isfinite(clip.actions).flatten(1).all(1)
        assert bool(known[acted].all()) and (settings.video or torch.equal(known, acted))


def test_what_data_without_actions_taught_is_known_after_loading(dots, patches, tmp_path):
    """By its shares it never learned video, nor what actions lead to; of video alone, and of what is not to be imitated, it did."""
    shares = {"policy": 1.0}
    options = {"video": (write_dots(tmp_path / "more"),), "demonstrations": "success"}
    for name, more, expected in (("a", options, ("forward", "video")), ("b", {}, ())):
        run = config(dots, patches, tmp_path / name, steps=1, model={"shares": shares}, **more)
        model = VideoActionModel.from_pretrained(video_action.run(run, progress=False))
        assert model.also_learned == expected
        assert set(facts(tmp_path / name, "world-model")) >= {"policy_error"}
        assert ("error_vs_copy" in facts(tmp_path / name, "world-model")) == bool(expected)


@pytest.mark.parametrize("design", ["uwm", "uva"])
def test_interrupted_and_resumed_it_is_bit_exact(design, dots, patches, tmp_path, monkeypatch):
    def run(out: Path, steps: int) -> None:
        video_action.run(config(dots, patches, out, design=design, steps=steps, loop={"save_every": 3}), progress=False)

    run(tmp_path / "whole", 6)
    original = video_action.VideoActionModel.loss
    calls = []

    def stop(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(video_action.VideoActionModel, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 6)
    monkeypatch.setattr(video_action.VideoActionModel, "loss", original)
    run(tmp_path / "parts", 6)
    one, two = (checkpoint.read_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_model_of_other_sizes_or_data_is_not_gone_on_from(dots, patches, tmp_path):
    video_action.run(config(dots, patches, tmp_path / "a"), progress=False)
    with pytest.raises(WorldlineError, match=r"model\.design: 'uwm' required, got 'uva'"):
        video_action.run(config(dots, patches, tmp_path / "b", design="uva", init_from=tmp_path / "a"), progress=False)
    with pytest.raises(WorldlineError, match="holds a run with other settings"):
        video_action.run(config(dots, patches, tmp_path / "a", stage="video"), progress=False)
