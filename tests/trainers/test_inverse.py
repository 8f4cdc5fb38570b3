"""The stage `inverse` on the dot world: it learns both ways and by both heads, and what it trained on stays known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.oracles import K
from tests.trainers.toy import dot_episode
from worldline import checkpoint
from worldline.data import LeRobotDataset, write_dataset
from worldline.errors import CheckpointError, DatasetError, WorldlineError
from worldline.policies import EncoderConfig
from worldline.rl_in_imagination.inverse import InverseConfig, InverseModel, window_rows
from worldline.rl_in_imagination.inverse_audit import check_inverse
from worldline.rl_in_imagination.inverse_networks import TokenConfig
from worldline.tokenizers import load_tokenizer
from worldline.trainers import inverse
from worldline.trainers.inputs import open_datasets
from worldline.trainers.inverse import TrainInverse, half_of, require_disjoint, with_fakes
from worldline.trainers.loop import LoopConfig
from worldline.trainers.transitions import TransitionDraw, whole_clips


def config(dots: Path, out: Path, steps: int = 250, **options) -> TrainInverse:
    loop = LoopConfig(
        steps=steps, batch_size=32, lr=3e-3, warmup=10, ema=0.95, cooldown=0.5, save_every=10_000, eval_every=10_000
    )
    model = {
        "shift": 0,
        "hidden": 64,
        "encoder": EncoderConfig(channels=(8, 16), features=32, shift=0),
        "tokens": TokenConfig(width=48, depth=1, heads=2, patch=4),
    }
    for name in ("architecture", "head", "window", "target"):
        if name in options:
            model[name] = options.pop(name)
    return TrainInverse(data=(dots,), out=out, model=InverseConfig(**model), loop=options.pop("loop", loop), **options)


def facts(folder: Path) -> dict:
    return checkpoint.load_config(folder, part="inverse")["provenance"]


@pytest.mark.parametrize("architecture", ["conv", "transformer"])
@pytest.mark.parametrize("head", ["continuous", "binned"])
def test_it_reads_the_dots_actions_and_is_not_fooled(architecture, head, dots, patches, tmp_path) -> None:
    out = inverse.run(
        config(dots, tmp_path / "idm", 400, architecture=architecture, head=head, tokenizer=patches), progress=False
    )
    learned = facts(out)
    assert learned["held_out_error"] < 0.5 * learned["guessing_the_mean"]
    assert learned["r2"] > 0.7 and set(learned) >= {"r2/dx", "r2/dy"}
    scores = {score["kind"]: score for score in learned["audit"]["scores"]}
    assert scores["exact"]["skill"] > 0.3 and scores["tokenizer"]["agreement"] == pytest.approx(
        scores["exact"]["agreement"], abs=1e-4
    )
    for kind in ("static", "single_frame", "blurred", "shuffled", "reversed", "ends", "wrong_action"):
        assert scores[kind]["skill"] < 0.25, kind
    model = InverseModel.from_pretrained(out)
    (clip, *_) = whole_clips(open_datasets((dots,), "held-out"))
    agreement = model.agreement({"top": clip.frames["top"][None]}, clip.actions[None])
    assert agreement.shape == (1, len(clip.actions)) and float(agreement.min()) >= 0 and float(agreement.max()) <= 1
    assert float(agreement.mean()) > float(
        model.agreement({"top": clip.frames["top"][None]}, -clip.actions[None]).mean()
    )


def test_all_k_actions_are_read_where_that_is_asked_for(dots, tmp_path) -> None:
    out = inverse.run(config(dots, tmp_path / "idm", target="all"), progress=False)
    model = InverseModel.from_pretrained(out)
    (clip, *_) = whole_clips(open_datasets((dots,), "held-out"))
    blocks = model.blocks({"top": clip.frames["top"][None]})[0]
    assert blocks.shape == clip.actions.shape == (len(clip.actions), K, 2)
    assert facts(out)["r2"] > 0.6


@pytest.mark.parametrize("stride", [1, 2])
def test_training_windows_are_those_of_use(stride, dots) -> None:
    selections = open_datasets((dots,), "train", stride=stride)
    draw = TransitionDraw(selections, 4)
    number, clip = selections[0].episodes[0], whole_clips(selections)[0]
    rows = window_rows(len(clip.actions) + 1, 4)
    mine = (
        torch.arange(len(clip.actions)) * stride
    )  # of the first episode's transitions those of the clip from its first frame
    got = draw.gather(mine)
    assert torch.equal(got.frames["top"], clip.frames["top"][rows]) and torch.equal(got.blocks, clip.actions)
    # a transition at the edge of a clip that is cut out of the middle of the episode
    cut = {c: x[3 * stride :: stride] for c, x in {"top": selections[0].store.frames(number, "top")}.items()}
    first = draw.gather(torch.tensor([3 * stride]), least=torch.tensor([0]), most=torch.tensor([2]))
    assert torch.equal(first.frames["top"][0], cut["top"][window_rows(len(cut["top"]), 4)[0]])
    last = draw.gather(torch.tensor([3 * stride]), least=torch.tensor([-1]), most=torch.tensor([1]))
    whole = selections[0].store.frames(number, "top")[::stride][: 3 + 2]
    assert torch.equal(last.frames["top"][0], whole[window_rows(5, 4)[-1]])


def test_batches_show_edges_and_reconstructions_and_depend_on_nothing_else(dots, patches) -> None:
    selections = open_datasets((dots,), "train")
    tokenizer = load_tokenizer(patches)
    decode = tokenizer.decode
    tokenizer.decode = lambda latents: {c: torch.zeros_like(x) for c, x in decode(latents).items()}
    draw = TransitionDraw(selections, 4, edges=0.5, tokenizer=tokenizer)
    first, again = draw.batch(1, 2, 64), draw.batch(1, 2, 64)
    assert torch.equal(first.frames["top"], again.frames["top"]) and torch.equal(first.blocks, again.blocks)
    black = (first.frames["top"].flatten(1) == 0).all(1)
    assert 16 < int(black.sum()) < 48, "about half are seen through the tokenizer"
    seen = first.frames["top"][~black]
    repeated = [int((seen[:, i] == seen[:, i + 1]).flatten(1).all(1).sum()) for i in (0, 2)]
    assert min(repeated) > len(seen) // 8, "many windows begin or end with a frame repeated"


def test_fakes_carry_another_action() -> None:
    frames = {"top": torch.randint(0, 256, (200, 3, 3, 16, 16), dtype=torch.uint8)}
    blocks = torch.arange(200.0)[:, None, None].expand(200, 2, 2)
    shown, told = with_fakes(frames, blocks, 0.4, torch.Generator().manual_seed(0))
    changed = (shown["top"] != frames["top"]).flatten(1).any(1)
    still = (shown["top"] == shown["top"][:, :1]).flatten(1).all(1)
    assert 50 < int(changed.sum()) < 110 and 20 < int(still.sum()) < int(changed.sum())
    assert torch.equal(told[~changed], blocks[~changed]) and int((told != blocks)[changed][:, 0, 0].sum()) > 0.9 * int(
        changed.sum()
    )


def test_halves_are_disjoint_and_longer_recordings_keep_them() -> None:
    first, second = half_of(range(200), "first"), half_of(range(200), "second")
    assert sorted(first + second) == list(range(200)) and 70 < len(first) < 130
    assert half_of(range(100), "first") == tuple(i for i in first if i < 100) and half_of((3, 5), "all") == (3, 5)


def test_a_reward_and_a_judge_share_neither_episodes_nor_architecture(dots, tmp_path) -> None:
    folders = {}
    for name, architecture, half in (
        ("reward", "conv", "first"),
        ("judge", "transformer", "second"),
        ("same_half", "transformer", "first"),
        ("same_kind", "conv", "second"),
        ("everything", "transformer", "all"),
    ):
        folders[name] = inverse.run(
            config(dots, tmp_path / name, 1, architecture=architecture, half=half), progress=False
        )
    require_disjoint(folders["reward"], folders["judge"])
    both = {name: set(facts(folders[name])["episodes"][0]) for name in ("reward", "judge", "everything")}
    assert both["reward"] | both["judge"] == both["everything"] == set(LeRobotDataset(dots).split("train"))
    with pytest.raises(
        WorldlineError, match=r"no common training episode is required, 1\d of .* Train one with --half first"
    ):
        require_disjoint(folders["reward"], folders["same_half"])
    with pytest.raises(WorldlineError, match="two architectures are required, both are conv"):
        require_disjoint(folders["reward"], folders["same_kind"])
    with pytest.raises(WorldlineError, match="no common training episode"):
        require_disjoint(folders["judge"], folders["everything"])
    with pytest.raises(WorldlineError, match=r"passed its audit is required, this one did not: "):
        check_inverse(folders["reward"])


def test_interrupted_and_resumed_is_bit_exact(dots, patches, tmp_path, monkeypatch) -> None:
    loop = LoopConfig(steps=6, batch_size=8, warmup=1, save_every=2, eval_every=6)
    options = {"architecture": "transformer", "tokenizer": patches, "loop": loop}
    straight = inverse.run(config(dots, tmp_path / "straight", **options), progress=False)
    whole = inverse._InverseStage.batch

    def interrupted(self, seed, step, size):
        if step == 3:
            raise KeyboardInterrupt
        return whole(self, seed, step, size)

    settings = config(dots, tmp_path / "resumed", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inverse._InverseStage, "batch", interrupted)
        inverse.run(settings, progress=False)
    inverse.run(settings, progress=False)
    for name in ("model.safetensors", "training/state.safetensors"):
        a, b = checkpoint.read_tensors(straight / name), checkpoint.read_tensors(tmp_path / "resumed" / name)
        assert [k for k in a if k != "seconds" and not torch.equal(a[k], b[k])] == []
    with pytest.raises(CheckpointError, match="half: was 'all', is now 'first'"):
        inverse.run(replace(settings, half="first"), progress=False)


def test_data_that_cannot_be_learned_from_is_named(dots, tmp_path) -> None:
    with pytest.raises(ValueError, match="fakes must be a share"):
        replace(config(dots, tmp_path / "x"), fakes=1.0)
    still = [replace(dot_episode(i, True), actions=torch.ones(11, K, 2)) for i in range(4)]
    constant = write_dataset(tmp_path / "constant", still, codec="libx264")
    with pytest.raises(DatasetError, match="actions that change are required, got constant ones alone"):
        inverse.run(config(constant, tmp_path / "y"), progress=False)
    silent = [replace(e, provenance={"actions": "unknown"}) for e in still]
    video = write_dataset(tmp_path / "video", silent, codec="libx264")
    with pytest.raises(DatasetError, match="episodes with actions are required"):
        inverse.run(config(video, tmp_path / "z"), progress=False)
    # of four episodes one or two train: a half can be empty
    halves = {half: half_of(LeRobotDataset(constant).split("train"), half) for half in ("first", "second")}
    for half, episodes in halves.items():
        if not episodes:
            with pytest.raises(DatasetError, match=f"training episodes in the {half} half required, got none"):
                inverse.run(config(constant, tmp_path / "w", half=half), progress=False)
