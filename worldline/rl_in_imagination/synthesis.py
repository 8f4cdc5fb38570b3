"""Imagined episodes that are worth learning from: rolled out from real first frames, scored, kept above a threshold.

Ctrl-World (2510.10125, section 4.4) made a policy better by fine-tuning on imagined successes that a person picked. Here a calibrated
scorer picks them, and every kept episode says which world model, policy, start, noise and score it came from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from worldline.executor import index_observation
from worldline.policies import Wandering
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.success import episode_probability, episode_success
from worldline.types import Observation, Policy, Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisConfig:
    """What is imagined, and which of it is kept."""

    frames: int = 41
    """Of an episode, its first one included."""
    wander: int = 0
    """Frames of a random walk from the real first frame before the episode begins: other starts than the data's. It then begins at an
    imagined frame."""
    spread: float = 0.5
    """Standard deviation of the walk's direction, in half ranges of the action."""
    tail: int = 4
    """Frames kept after success was seen."""
    keep: Literal["success", "all"] = "success"
    """success: episodes above the threshold. all: every episode, labelled by the scorer (for offline RL)."""

    def __post_init__(self) -> None:
        if self.frames < 2 or min(self.wander, self.tail) < 0 or self.spread < 0:
            raise ValueError(
                "frames of at least 2, wander, tail and spread of at least 0 required, got "
                f"{self.frames}, {self.wander}, {self.tail} and {self.spread}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaginedEpisode:
    """One imagined episode, scored. `score`: the success probability it kept up; it is a success if that exceeds the threshold."""

    frames: Mapping[str, UInt8[Tensor, "t c _h _w"]]
    poses: Float[Tensor, "t p"]
    actions: Float[Tensor, "t-1 k a"]
    probability: Float[Tensor, " t"]
    frame_success: Bool[Tensor, " t"]
    success: bool
    score: float
    instruction: str
    start: int  # which of the real first observations
    seed: int


def synthesize(
    dream: Dream,
    policy: Policy,
    scorer: Scorer,
    starts: Observation,
    config: SynthesisConfig,
    *,
    chosen: Tensor,
    seeds: Tensor,
    threshold: float,
    persist: int,
    instruction: str | None = None,
) -> Iterator[ImaginedEpisode]:
    """One imagined episode for each of `chosen` (numbers of starts) with its seed, whether it is to be kept or not.

    An episode ends `tail` frames after success, or at the horizon.
    """
    first = index_observation(starts, chosen)
    if instruction is not None:
        first = replace(first, instruction=(instruction,) * len(first))
    acting = Wandering(policy, blocks=config.wander, spread=config.spread) if config.wander else policy
    made = rollout(
        dream,
        acting,
        scorer,
        first,
        frames=config.wander + config.frames,
        seeds=seeds,
        keep_frames=True,
        batch=len(first),
    )
    probability = made.probability[:, config.wander :]
    done = probability > threshold
    scores = episode_probability(probability, persist=persist)
    for i, start in enumerate(chosen.tolist()):
        held = done[i].unfold(0, persist, 1).all(1) if done.shape[1] >= persist else done[i, :0]
        end = config.frames
        if bool(held.any()):
            end = min(end, int(held.int().argmax()) + persist + config.tail)
        rows = slice(config.wander, config.wander + end)
        yield ImaginedEpisode(
            frames={c: x[i, rows] for c, x in made.frames.items()},
            poses=made.poses[i, rows],
            actions=made.actions[i, config.wander : config.wander + end - 1],
            probability=probability[i, :end],
            frame_success=done[i, :end],
            success=bool(episode_success(done[i : i + 1, :end], persist=persist)[0]),
            score=float(scores[i]),
            instruction=first.instruction[i],
            start=start,
            seed=int(seeds[i]),
        )
