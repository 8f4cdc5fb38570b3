"""Episodes that end at success, as most Gymnasium tasks do: one rule for them in labels, replays and scorers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.oracles import GOAL, SPEC, DotScorer, ExactDotWorldModel, dot_tokenizer, draw
from worldline.commands import dreaming, ranking
from worldline.data import LeRobotDataset
from worldline.data.lerobot_write import DatasetWriter
from worldline.eval.ranking import replay_diagnostic, score_frames
from worldline.eval.replays import join_replays, load_replays
from worldline.policies.encoder import EncoderConfig
from worldline.rl_in_imagination.dream import Dream
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer
from worldline.trainers import scorer as stage
from worldline.trainers.inputs import open_datasets

WON, LOST, LENGTH = 7, 7, 20


@dataclass(frozen=True)
class Rule:
    threshold: float = 0.5
    persist: int = 2


class Exact(SuccessScorer):
    """Knows success when it sees it."""

    def __init__(self, rule: Rule | None = None) -> None:
        nn.Module.__init__(self)
        self.config: Any = rule or Rule()
        self.reset, self.step, self.spec, self.window = DotScorer().reset, DotScorer().step, SPEC, 1


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    """Seven that are over as soon as the dot is beyond the goal, after 6 to 12 frames, and seven that never get there."""
    writer = DatasetWriter(tmp_path_factory.mktemp("ended") / "data", SPEC)
    for i in range(WON + LOST):
        won = i < WON
        t = 6 + i if won else LENGTH
        generator = torch.Generator().manual_seed(i)
        places = 0.4 * torch.rand(t, 2, generator=generator) + 0.2
        if won:
            places[-1, 0] = GOAL + 0.1
        writer.stage(
            i,
            frames={"top": draw(places)},
            actions=torch.rand(t - 1, 2, 2, generator=generator),
            poses=places,
            frame_success=places[:, 0] > GOAL,
            success=won,
            terminated=won,
            truncated=not won,
            provenance={"cause": "policy"},
        )
    writer.finish()
    return LeRobotDataset(writer.root)


def every(data: LeRobotDataset, **options):
    return load_replays(data, range(len(data)), cameras=["top"], frames=None, **options)


def test_the_fastest_success_does_not_say_how_long_an_episode_is(ended) -> None:
    cut, whole = every(ended), every(ended, held=True)
    assert cut.poses.shape[1] == 6 and cut.ends == (None,) * 14
    assert whole.poses.shape[1] == LENGTH and whole.ends == (*range(5, 12), *[None] * 7)
    for i in range(WON):  # as it ended
        assert torch.equal(whole.poses[i, 5 + i :], whole.poses[i, 5 + i].expand(LENGTH - 5 - i, -1))
        assert torch.equal(whole.frames["top"][i, -1], whole.frames["top"][i, 5 + i])
        assert torch.equal(whole.actions[i, : 5 + i], ended.episode(i).actions)
    assert join_replays([whole, cut]).ends[:2] == (5, None)  # what is cut before its end goes on


def test_a_perfect_dream_and_scorer_are_told_so(ended) -> None:
    for persist in (1, 2, 3):
        judge = Exact(Rule(persist=persist))
        replays = every(ended, held=True)
        found = replay_diagnostic(judge, replays, score_frames(judge, replays.frames, replays.instruction))
        assert found.by_cause == {"policy": (14, WON, WON)} and found.calibration.auroc == 1


def test_what_is_dreamt_after_the_end_does_not_count(ended) -> None:
    replays = every(ended, held=True)
    values = torch.arange(LENGTH).expand(14, -1).float()
    held = replays.held(values, beyond=2)
    assert torch.equal(held[0], torch.arange(LENGTH + 2).clamp(max=5).float())
    assert torch.equal(held[-1], torch.cat([torch.arange(LENGTH), torch.zeros(2)]))


def test_success_between_two_strided_frames_is_not_lost(ended) -> None:
    replays = every(ended, held=True, stride=2)
    assert replays.frame_success is not None and replays.poses.shape[1] == LENGTH // 2
    assert replays.frame_success.any(1).tolist() == [True] * WON + [False] * LOST


def test_a_scorer_is_calibrated_by_the_labels_that_replays_have(ended, monkeypatch) -> None:
    """At a stride too: what the first threshold comes from is what it is then tried on."""
    judge = SuccessScorer(SuccessConfig(hidden=8, encoder=EncoderConfig(window=2, channels=(8,), features=8)), SPEC)
    monkeypatch.setattr(stage, "score_video", lambda _scorer, video, _: torch.zeros(len(next(iter(video.values())))))
    (chosen,) = open_datasets((ended.root,), "all")
    for stride in (1, 2, 3, 4):
        replays = every(ended, held=True, stride=stride)
        _, labels, over = stage.read_episodes(judge, [replace(chosen, stride=stride)], None)
        assert replays.frame_success is not None
        for own, label, end in zip(replays.frame_success, labels, over):
            assert torch.equal(own[: len(label)], label) and end == bool(label[-1])


def test_a_scorer_is_calibrated_and_audited_on_them(ended, monkeypatch) -> None:
    """A scorer that is certain of what it sees."""
    judge = SuccessScorer(SuccessConfig(hidden=8, encoder=EncoderConfig(window=2, channels=(8,), features=8)), SPEC)

    def certain(_scorer, video, _instruction):
        return 16 * score_frames(Exact(), {c: x[None] for c, x in video.items()}, ("",))[0] - 8

    monkeypatch.setattr(stage, "score_video", certain)
    chosen = open_datasets((ended.root,), "train")
    count = sum(ended.terminated(i) for i in chosen[0].episodes)
    calibrated, facts = stage.calibrate(judge, chosen, None)
    assert facts["held_out_successes"] == count and facts["episode_accuracy"] == 1
    found = stage.audit(calibrated, chosen)
    assert found["exact"] == 1 and found["static"] == found["first_quarter"] == 0


class Sampled(ExactDotWorldModel):
    """As a trained one says how it is sampled."""

    def __init__(self) -> None:
        super().__init__(dot_tokenizer())
        self.sampling: dict[str, Any] = {}


@pytest.mark.parametrize("frames", [None, 18])
def test_eval_finds_the_success_that_rank_finds(ended, frames, monkeypatch, tmp_path) -> None:
    """By default the fastest success cut every episode before any other; with more --frames successes were left out as too short."""
    dream = Dream(Sampled(), dot_tokenizer())
    monkeypatch.setattr(dreaming, "load_dream", lambda *_: dream)
    monkeypatch.setattr(dreaming, "TrainedWorldModel", Sampled)
    monkeypatch.setattr(SuccessScorer, "from_pretrained", lambda _: Exact())
    data: dict[str, Any] = {"world_model": Path("wm"), "scorer": Path("s"), "data": (ended.root,), "frames": frames}
    dreaming.run_eval(dreaming.Evaluate(**data, out=tmp_path / "eval", split="all"), progress=False)
    told = json.loads((tmp_path / "eval" / "report.json").read_text())

    ranked = ranking.Rank(**data, policies=("a", "b"), out=tmp_path / "rank", replays="all")
    judges = ranking._Judges(dream=dream, scorer=Exact(), kept=ranking.Kept(tmp_path / "rank"), identity=[])
    found = ranking._replay(ranked, judges, ranking._load_replays(ranked, dream), progress=False)
    assert found is not None and found.by_cause["policy"][:2] == (14, WON)
    assert told["results"]["replay_diagnostic"]["by_cause"]["policy"] == list(found.by_cause["policy"])
    assert told["results"]["frames"] == (frames or 6)  # videos are compared as far as all of them go
    assert any("7 of these" in w and "terminated" in w for w in told["warnings"]) == (frames is not None)
