"""Stage `policy`: clone demonstrations with a Gaussian, a discretised or a diffusion policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.errors import CheckpointError, DatasetError
from worldline.policies import ClonedPolicy, PolicyConfig
from worldline.trainers.inputs import Selection, claim_output, contents, data_provenance, fit_normalizers, open_datasets
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.samples import SampleDraw, Samples
from worldline.types import Episode, WorldSpec, require_match


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPolicy:
    """Clone a policy from a dataset's demonstrations.

    Example: worldline train policy --data data/drawer --kind bc --episodes 50 --out runs/bc50
    """

    data: tuple[Path, ...]
    """Dataset folders."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    kind: Literal["bc", "discrete", "diffusion"] = "bc"
    """bc: Gaussian behaviour cloning. discrete: each action dimension in bins (two-hot targets). diffusion: a denoised action chunk."""
    episodes: int | None = None
    """How many demonstrations to use, drawn by --loop.seed; all by default."""
    demonstrations: Literal["expert", "success", "all"] = "success"
    """Which episodes are demonstrations: recorded by the expert, labelled successful, or all."""
    imagined_share: float | None = None
    """Share of every batch that is drawn from imagined episodes (`worldline synthesize`), the rest from real ones; by default all
    frames count alike."""
    init_from: Path | None = None
    """A policy to go on from: its weights and its normalisation. Kind and sizes must be the same."""
    stride: int = 1
    """Dataset frames per frame that the policy sees and is asked at: that of the world model it will act in."""
    cameras: tuple[str, ...] | None = None
    """Cameras to see. Default: all."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1200, batch_size=64, lr=1e-3, ema=0.995))

    def __post_init__(self) -> None:
        if self.policy.kind not in (PolicyConfig().kind, self.kind):
            raise ValueError(
                f"--kind says what policy it is, got --kind {self.kind} and --policy.kind {self.policy.kind}"
            )
        if self.episodes is not None and self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        if self.imagined_share is not None and not 0 < self.imagined_share < 1:
            raise ValueError(f"imagined_share between 0 and 1 required, got {self.imagined_share}")


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("a minute or two on a 2-core CPU", {}),
    "small": ("more steps; minutes on a GPU", {"loop": LoopConfig(steps=20_000, batch_size=256, lr=1e-3)}),
}


class _PolicyStage:
    name = "policy"

    def __init__(self, model: ClonedPolicy, draw: SampleDraw, held_out: SampleDraw | None) -> None:
        self.model, self.draw, self.held_out = model, draw, held_out

    def batch(self, seed: int, step: int, size: int) -> Samples:
        return self.draw.batch(seed, step, size)

    def loss(self, model: Any, batch: Samples, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = model.loss(batch.observation, batch.target, generator)
        return loss, {}

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Mean absolute error of the chunk on held-out demonstrations, in action units."""
        if self.held_out is None:
            return {}
        samples = self.held_out.batch(0, 0, min(256, len(self.held_out)))
        n = len(samples.target)
        chunk, _ = model.act(samples.observation, model.reset(n), seeds=torch.arange(n))
        return {"action_error": float((chunk - samples.target).abs().mean())}

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.save_pretrained(folder, provenance=provenance)


def chunks(length: int):
    """Target function of imitation: at each frame, the `length` actions that follow, as recorded."""

    def target(episode: Episode) -> tuple[Tensor, Tensor]:
        flat = episode.actions.flatten(0, 1)
        k = episode.actions.shape[1]
        times = torch.arange(max(0, (len(flat) - length) // k + 1))
        if not len(times):  # shorter than a chunk: nothing to learn from
            return times, flat.new_zeros(0, length, flat.shape[1])
        return times, torch.stack([flat[t * k : t * k + length] for t in times.tolist()])

    return target


def demonstrations(selections: Sequence[Selection], kind: str, count: int | None, seed: int) -> list[Selection]:
    """The episodes that count as demonstrations, `count` of them in an order drawn by `seed`.

    Raises `DatasetError` if there are fewer.
    """
    found = []
    for which, s in enumerate(selections):
        for number in s.episodes:
            episode = s.dataset.episode(number)
            expert = episode.provenance.get("cause") == "expert"
            if kind == "all" or (kind == "success" and episode.success) or (kind == "expert" and expert):
                found.append((which, number))
    if not found or (count is not None and len(found) < count):
        raise DatasetError(
            f"{count or 1} demonstrations ({kind}) required, {len(found)} found among "
            f"{sum(len(s.episodes) for s in selections)} training episodes. Record more, or use --demonstrations all."
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [found[i] for i in order[:count]]
    return [
        replace(s, episodes=tuple(sorted(n for w, n in chosen if w == which)))
        for which, s in enumerate(selections)
        if any(w == which for w, _ in chosen)
    ]


def require_whole_block(settings: PolicyConfig, spec: WorldSpec) -> None:
    """Raise `DatasetError` unless a chunk holds at least the actions of one frame."""
    if settings.chunk < spec.control_steps:
        raise DatasetError(
            f"chunks of at least {spec.control_steps} actions (control steps times stride) are required, got "
            f"{settings.chunk}: use --policy.chunk {spec.control_steps} or a smaller --stride."
        )


def is_imagined(episode: Episode) -> bool:
    """Whether `worldline synthesize` made it."""
    return episode.provenance.get("cause") == "imagined"


def begin_policy(folder: Path | None, settings: PolicyConfig, picked: Sequence[Selection]) -> ClonedPolicy:
    """The policy to train: a new one with the normalisation of these episodes, or the one in `folder`, to go on from.

    Raises `CheckpointError` if that is of another kind or size, `SpecMismatch` if it is for another world.
    """
    spec = picked[0].spec
    if folder is None:
        actions, poses = fit_normalizers(picked)
        return ClonedPolicy(settings, spec, action_normalizer=actions, pose_normalizer=poses)
    policy = ClonedPolicy.from_pretrained(folder)
    require_match(spec, policy.spec, between=f"data and policy {folder}")
    different = [
        f"  policy.{f.name}: {getattr(policy.config, f.name)!r} required, got {getattr(settings, f.name)!r}"
        for f in fields(PolicyConfig)
        if f.name not in ("sample", "solver_steps") and getattr(policy.config, f.name) != getattr(settings, f.name)
    ]
    if different:
        raise CheckpointError(
            f"--init-from {folder}: a policy of the same kind and size is required:\n" + "\n".join(different)
        )
    return policy.train()


def run(config: TrainPolicy, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder."""
    settings = replace(config.policy, kind=config.kind)
    options: dict[str, Any] = {"cameras": config.cameras, "stride": config.stride}
    opened = open_datasets(config.data, "train", **options)
    picked = demonstrations(opened, config.demonstrations, config.episodes, config.loop.seed)
    held_out = None
    try:
        others = demonstrations(open_datasets(config.data, "held-out", **options), config.demonstrations, None, 0)
        held_out = SampleDraw(others, chunks(settings.chunk))
    except DatasetError:
        held_out = None  # a small dataset may hold no held-out demonstration; then nothing is reported
    require_whole_block(settings, picked[0].spec)
    claim_output(
        config.out,
        "policy",
        config,
        identity=(
            "data",
            "cameras",
            "kind",
            "episodes",
            "demonstrations",
            "imagined_share",
            "init_from",
            "stride",
            "policy",
        ),
        made_from=contents(opened),
    )
    torch.manual_seed(config.loop.seed)
    policy = begin_policy(config.init_from, settings, picked)
    provenance = {
        **data_provenance(picked, config.out),
        "demonstrations": sum(len(s.episodes) for s in picked),
        "episodes": {str(s.dataset.root): list(s.episodes) for s in picked},
    }
    share = {} if config.imagined_share is None else {"apart": is_imagined, "share": config.imagined_share}
    stage = _PolicyStage(policy, SampleDraw(picked, chunks(settings.chunk), **share), held_out)
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)
