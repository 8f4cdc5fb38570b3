"""Stage `offline`: offline reinforcement learning (implicit Q-learning) on recorded or imagined episodes.

What refinement in a world model has to beat on the same real data, beside cloning its successes (stage `policy`). A sample is a decision,
as the executor makes it: the chunk recorded from frame i on, its whole blocks sent, and the frame after them.

    frame      i ------- + ------- + ------- i + ahead          m = 12, k = 4: three frames a decision
    reward         0         0         1                        1 where success is seen; that ends the problem

Success is the scorer's rule: its label has held for `persist` frames in a row. What was recorded after it is left out. A decision whose
episode the recorder terminated with it is terminated, one at the end of a recording that was cut is not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from worldline.errors import DatasetError
from worldline.policies import ClonedPolicy, PolicyConfig
from worldline.rl_in_imagination.iql import ImplicitQLearner, IQLConfig, Transitions, require_density
from worldline.trainers.inputs import Selection, claim_output, contents, data_provenance, open_datasets
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.policy import begin_policy, chunks, demonstrations, require_whole_block
from worldline.trainers.samples import SampleDraw, Samples
from worldline.trainers.scorer import frame_labels
from worldline.types import Episode, WorldSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOffline:
    """Learn a policy from good and bad episodes by implicit Q-learning, without a world model.

    Example: worldline train offline --data data/drawer --out runs/iql
    """

    data: tuple[Path, ...]
    """Dataset folders with success labels: recorded, or imagined by `worldline synthesize --make.keep all`."""
    out: Path
    """Folder for the policy. A run that was interrupted goes on there."""
    kind: Literal["bc", "discrete", "diffusion"] = "bc"
    """bc: a Gaussian policy. discrete: each action dimension in bins. A diffusion policy has no density and is refused."""
    episodes: int | None = None
    """How many episodes to use, drawn by --loop.seed as `train policy --demonstrations all` draws them; all by default."""
    init_from: Path | None = None
    """A policy to go on from: its weights and its normalisation. Kind and sizes must be the same."""
    stride: int = 1
    """Dataset frames per frame that the policy sees and is asked at: that of the world model it will act in."""
    cameras: tuple[str, ...] | None = None
    """Cameras to see. Default: all."""
    persist: int = 2
    """Frames in a row that success must hold: the scorer's (--scorer.persist)."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=2000, batch_size=64, lr=1e-3, ema=0.995))

    def __post_init__(self) -> None:
        require_density(self.kind)
        if self.policy.kind not in (PolicyConfig().kind, self.kind):
            raise ValueError(
                f"--kind says what policy it is, got --kind {self.kind} and --policy.kind {self.policy.kind}"
            )
        if self.episodes is not None and self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        if self.persist < 1:
            raise ValueError(f"persist must be at least 1, got {self.persist}")


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("minutes on a 2-core CPU", {}),
    "small": (
        "more steps and a slower target; minutes on a GPU",
        {"loop": LoopConfig(steps=30_000, batch_size=256, lr=5e-4), "iql": IQLConfig(polyak=0.005)},
    ),
}


class _OfflineStage:
    name = "offline"

    def __init__(
        self, model: ImplicitQLearner, draw: SampleDraw, held_out: SampleDraw | None, experts: SampleDraw | None
    ) -> None:
        self.model, self.draw, self.held_out, self.experts = model, draw, held_out, experts

    def batch(self, seed: int, step: int, size: int) -> Samples:
        return self.draw.batch(seed, step, size)

    def loss(self, model: Any, batch: Samples, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return model.loss(transitions(batch, model.policy), generator)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """On held-out episodes: the root mean square error of Q by one step, the mean value, and, as stage `policy` has it, the mean
        absolute error of the chunk where episodes succeeded, in action units."""
        found = {}
        if self.held_out is not None:
            batch = transitions(self.held_out.batch(0, 0, min(256, len(self.held_out))), model.policy)
            best, goal = model.estimates(batch)
            value = model.critic.v(model.critic.features(batch.observation))
            found = {"one_step_error": float((best - goal).square().mean().sqrt()), "value": float(value.mean())}
        if self.experts is not None:
            samples = self.experts.batch(0, 0, min(256, len(self.experts)))
            n = len(samples.target)
            chunk, _ = model.policy.act(samples.observation, model.policy.reset(n), seeds=torch.arange(n))
            found["action_error"] = float((chunk - samples.target).abs().mean())
        return found

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.policy.save_pretrained(folder, provenance=provenance)


def frames_ahead(chunk: int, spec: WorldSpec, stride: int) -> int:
    """Dataset frames that a decision lasts: those of the whole blocks of a chunk."""
    return chunk // spec.control_steps * stride


def success_seen(episode: Episode, *, stride: int, persist: int) -> Bool[Tensor, " t"]:
    """At each frame: whether success had been seen by then, by one who sees every `stride`-th frame up to this one.

    It is seen where it has held for `persist` such frames. At the end of a terminated episode one is enough: it is held on, as in
    rollouts (`commands/rollouts.py`), since nothing can undo it. Without labels False throughout.
    """
    times, labels = frame_labels(stride)(episode)
    seen = torch.zeros(len(episode), dtype=torch.bool)
    if not len(times):
        return seen
    done = labels > 0.5
    for phase in range(min(stride, len(done))):
        frames = done[phase::stride]
        held = torch.zeros_like(frames)
        if len(frames) >= persist:
            held[persist - 1 :] = frames.unfold(0, persist, 1).all(1)
        seen[phase::stride] = held.cummax(0).values
    if episode.terminated:
        seen[-1] |= done[-1]
    return seen


def decisions(chunk: int, spec: WorldSpec, *, stride: int, persist: int):
    """Target function of offline learning: every decision up to success, as rows "m (m a + 2)": the chunk flattened, its reward, and
    whether it ended the episode. Of an episode without labels there are none."""
    ahead = frames_ahead(chunk, spec, stride)

    def target(episode: Episode) -> tuple[Tensor, Tensor]:
        times, actions = chunks(chunk)(episode)
        if episode.frame_success is None or not len(times):
            return times[:0], torch.zeros(0, chunk * spec.action.dim + 2)
        seen = success_seen(episode, stride=stride, persist=persist)
        times, actions = times[~seen[times]], actions[~seen[times]]
        reward = seen[times + ahead]
        over = reward | (episode.terminated & (times + ahead == len(episode) - 1))
        return times, torch.cat([actions.flatten(1), reward[:, None], over[:, None]], dim=1)

    return target


def transitions(samples: Samples, policy: ClonedPolicy) -> Transitions:
    """Decisions as the learner takes them, from samples that `decisions` defines."""
    assert samples.after is not None
    size = (policy.config.chunk, policy.spec.action.dim)
    return Transitions(
        observation=samples.observation,
        actions=samples.target[:, :-2].unflatten(1, size),
        reward=samples.target[:, -2],
        terminated=samples.target[:, -1] > 0.5,
        after=samples.after,
    )


def require_successes(selections: Sequence[Selection], persist: int) -> int:
    """How many episodes reach success, at the selections' stride. Raises `DatasetError` if some have no labels or none succeeds."""
    episodes = [(s, s.dataset.episode(number)) for s in selections for number in s.episodes]
    unlabelled = sum(episode.frame_success is None for _, episode in episodes)
    if unlabelled:
        raise DatasetError(
            f"success labels of every frame (`next.success`) are required, {unlabelled} of {len(episodes)} episodes have none. Record "
            "them where success is known (`worldline record`), let a scorer label imagined ones (`worldline synthesize "
            "--make.keep all`), or clone demonstrations instead (`worldline train policy`)."
        )
    found = sum(bool(success_seen(e, stride=s.stride, persist=persist).any()) for s, e in episodes)
    if not found:
        raise DatasetError(
            f"at least one episode in which success holds for {persist} frames is required, got none of {len(episodes)}: without a "
            "reward there is nothing to prefer. Record successes too, or use a smaller --persist."
        )
    return found


def run(config: TrainOffline, *, progress: bool = True) -> Path:
    """Train and save. Returns the policy's folder."""
    settings = replace(config.policy, kind=config.kind)
    opened = open_datasets(config.data, "train", cameras=config.cameras, stride=config.stride)
    picked = demonstrations(opened, "all", config.episodes, config.loop.seed)
    spec = picked[0].spec
    require_whole_block(settings, spec)
    successes = require_successes(picked, config.persist)
    target = decisions(settings.chunk, spec, stride=config.stride, persist=config.persist)
    ahead = frames_ahead(settings.chunk, spec, config.stride)
    draw = SampleDraw(picked, target, ahead=ahead)
    rewarded = int((draw.targets[:, -2] > 0.5).sum())
    if not rewarded:
        raise DatasetError(
            f"a decision that reaches success is required, got none of {len(draw)}: the recordings end with fewer than the "
            f"{settings.chunk} actions of a chunk up to it. Use a smaller --policy.chunk, or record on after success."
        )
    claim_output(
        config.out,
        "policy (offline)",
        config,
        identity=("data", "cameras", "kind", "episodes", "init_from", "stride", "persist", "policy", "iql"),
        made_from=contents(opened),
    )
    torch.manual_seed(config.loop.seed)
    policy = begin_policy(config.init_from, settings, picked)
    provenance = {
        **data_provenance(picked, config.out),
        "episodes": {str(s.dataset.root): list(s.episodes) for s in picked},
        "iql": asdict(config.iql),
        "successes": successes,
        "decisions": len(draw),
        "rewarded_decisions": rewarded,
    }
    stage = _OfflineStage(
        ImplicitQLearner(policy, config.iql),
        draw,
        _held_out(config, lambda s: SampleDraw(s, target, ahead=ahead)),
        _held_out(config, lambda s: SampleDraw(demonstrations(s, "success", None, 0), chunks(settings.chunk))),
    )
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)


def _held_out(config: TrainOffline, make: Callable[[Sequence[Selection]], SampleDraw]) -> SampleDraw | None:
    """Held-out samples; None where a small dataset holds none, and then nothing is reported."""
    try:
        return make(open_datasets(config.data, "held-out", cameras=config.cameras, stride=config.stride))
    except DatasetError:
        return None
