"""What the evaluation concludes from its tables."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import nn

from tests.oracles import ExactDotWorldModel, dot_tokenizer
from tests.trainers.toy import write_dots
from worldline.commands import dreaming
from worldline.eval.probes import Probe
from worldline.eval.replays import Replays, join_replays
from worldline.eval.world_model import action_following, worst_gains
from worldline.rl_in_imagination.dream import Dream
from worldline.types import TensorState


class Diverging(ExactDotWorldModel):
    """Its first row's poses are infinite from the fourth imagined frame on."""

    sampling: ClassVar[dict[str, Any]] = {}

    def observe(self, clip):
        state = super().observe(clip)
        return TensorState(tensors={**state.tensors, "age": torch.zeros(state.rows)}, rows=state.rows)

    def imagine(self, state, actions, *, seeds):
        after, made = super().imagine(state, actions, seeds=seeds)
        age = state.tensors["age"] + 1
        lost = (seeds == 0) & (age > 3)
        poses = torch.where(lost[:, None, None], torch.inf, made.poses)
        return TensorState(tensors={**after.tensors, "age": age}, rows=len(age)), replace(made, poses=poses)


def test_a_dream_that_diverges_does_not_lose_the_evaluation(tmp_path, monkeypatch) -> None:
    """The report refused what is not finite, after hours."""
    dream = Dream(Diverging(dot_tokenizer()), dot_tokenizer())
    monkeypatch.setattr(dreaming, "load_dream", lambda *_: dream)
    monkeypatch.setattr(dreaming, "TrainedWorldModel", Diverging)
    data, out = write_dots(tmp_path / "data", episodes=4), tmp_path / "report"
    asked = dreaming.Evaluate(world_model=Path("wm"), data=(data,), split="all", out=out, videos=0)
    told = json.loads((dreaming.run_eval(asked, progress=False) / "report.json").read_text())
    errors = told["results"]["pose_error"]
    assert len(errors) == 11 and errors[3:] == [None] * 8 and max(errors[:3]) < 0.01
    assert told["results"]["diverged"] == {"episodes": 1, "from_frame": 4}
    assert any("1 of 4 episodes diverged from frame 4 on" in warning for warning in told["warnings"])


def row(horizon: int, gain: float, *, half: float = 1.0, camera: str = "rgb", baseline: str = "copy-first") -> dict:
    interval = {"low": gain - half, "high": gain + half}
    return {"baseline": baseline, "camera": camera, "horizon": horizon, "gain_db": gain, **interval}


def test_worst_gains_count_intervals_above_zero_from_the_second_frame_on() -> None:
    found = worst_gains([row(1, -3.0), row(2, 2.0), row(3, 0.5), row(4, 1.5), row(2, -4.0, camera="wrist")])
    assert [(r["camera"], r["horizons"], r["above"]) for r in found] == [("rgb", 3, 2), ("wrist", 1, 0)]
    assert found[0]["smallest"]["horizon"] == 3  # not frame 1, where hardly anything has moved
    # an interval that lies below zero excludes it too, and does not count
    assert found[1]["smallest"]["gain_db"] == -4.0


def test_worst_gains_keep_baselines_apart_and_skip_those_without_later_frames() -> None:
    found = worst_gains([row(2, 5.0), row(2, 1.5, baseline="action-free"), row(1, 1.0, camera="wrist")])
    assert [(r["baseline"], r["above"]) for r in found] == [("copy-first", 1), ("action-free", 1)]


def replays(n: int, t: int, states: int = 2) -> Replays:
    return Replays(
        episodes=tuple(range(n)),
        frames={"rgb": torch.randint(256, (n, t, 3, 4, 4), dtype=torch.uint8)},
        poses=torch.randn(n, t, 3),
        actions=torch.randn(n, t - 1, 2, 4),
        instruction=("push",) * n,
        frame_success=torch.rand(n, t) < 0.5,
        states=torch.randn(n, t, states),
        causes=("expert",) * n,
    )


def test_joined_replays_are_cut_to_the_shortest() -> None:
    long, short = replays(2, 9), replays(3, 6)
    both = join_replays([long, short])
    assert both.poses.shape[:2] == (5, 6) and both.actions.shape[:2] == (5, 5) and len(both.causes) == 5
    assert torch.equal(both.frames["rgb"][0], long.frames["rgb"][0, :6])
    assert torch.equal(both.first.images["rgb"][2:], short.first.images["rgb"])
    assert both.frame_success is not None and both.frame_success.shape == (5, 6) and both.states.shape == (5, 6, 2)


def test_joined_replays_lose_labels_and_states_that_a_part_lacks() -> None:
    both = join_replays([replays(2, 5), replace(replays(2, 5, states=0), frame_success=None)])
    assert both.frame_success is None and both.states.shape == (4, 5, 0)


def test_a_noisy_camera_is_noisy_in_what_the_dream_begins_with_and_not_in_what_it_is_compared_with() -> None:
    clear = replays(64, 3)
    grainy = replace(clear, frames={"rgb": clear.frames["rgb"] // 2 + 64}, noisy={"rgb": 0.1})
    shown, real = grainy.first.images["rgb"], grainy.frames["rgb"][:, 0]
    assert torch.equal(shown, grainy.first.images["rgb"])  # the same noise every time
    assert abs(float((shown.float() - real).std()) - 25.5) < 1.5


def test_an_action_that_never_changes_has_no_share_in_how_well_actions_are_followed() -> None:
    clips = replays(8, 6)
    held = torch.cat([clips.actions[..., :3], torch.full_like(clips.actions[..., :1], -1.0)], -1)
    clips = replace(clips, actions=held)

    class Near(Probe):
        """Reads all dimensions 0.02 off."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.config = cast(Any, SimpleNamespace(names=("dx", "dy", "dz", "gripper")))

        def read_video(self, video):
            return held.mean(2) + 0.02

    found = action_following(Near(), clips, {name: {} for name in ("tokenizer", "true", "copy-first")})
    assert found["true"]["r2"][3] is None and found["true"]["r2_mean"] > 0.99
