"""Stage `probe`: train a small regressor on real frames that will read imagined ones.

Targets: `object` (where the manipulated object is, in pixels of a camera), `action` (the mean action of the block between
two frames: an inverse dynamics model), `state` (any columns of the recorded low-dimensional state), `identity` (what lies
below the hand of an arm/... world, see `worldline.eval.revisit`), `pose` (the recorded
pose, read from one camera alone: two such probes tell whether the views of an imagined frame agree).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.checkpoint import best_device
from worldline.data import LeRobotDataset, RobustNormalizer
from worldline.errors import DatasetError
from worldline.eval.probes import Probe, ProbeConfig
from worldline.policies import EncoderConfig
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.trainers.inputs import cameras_of, claim_output, contents, data_provenance, open_datasets
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.samples import SampleDraw, Samples
from worldline.trainers.scorer import half_reconstructed
from worldline.types import Episode


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProbe:
    """Train a probe that reads positions or actions off frames.

    Example: worldline train probe --data data/drawer --target object --out runs/probe
    """

    data: tuple[Path, ...]
    """Dataset folders."""
    out: Path
    """Folder for the checkpoint."""
    target: Literal["object", "action", "state", "pose", "identity"] = "object"
    """object: pixel position of the manipulated object (Meta-World). action: inverse dynamics. state: --columns.
    pose: the recorded pose, seen by --camera alone. identity: colour and shape of what lies below the hand (arm/...)."""
    columns: tuple[int, ...] = ()
    """Columns to predict: of the recorded state (target state), of the pose (target pose; all by default)."""
    camera: str = "corner2"
    """The camera in whose pixels an object's position is told (target object), or the only one seen (target pose)."""
    tokenizer: Path | None = None
    """Show half of the training frames as this tokenizer reconstructs them."""
    cameras: tuple[str, ...] | None = None
    """Cameras to see. Default: those of --tokenizer, or all."""
    stride: int = 1
    """Dataset frames per frame seen: that of the world model it will be used with."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=800, batch_size=64, lr=1e-3, ema=0.99))

    def __post_init__(self) -> None:
        if min(self.columns, default=0) < 0:
            raise ValueError(f"columns are counted from 0, got {self.columns}")


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {"tiny": ("a minute or two on a 2-core CPU", {})}


class _ProbeStage:
    name = "probe"

    def __init__(self, model: Probe, draw: SampleDraw, held_out: SampleDraw, tokenizer: Tokenizer | None) -> None:
        self.model, self.draw, self.held_out, self.tokenizer = model, draw, held_out, tokenizer

    def batch(self, seed: int, step: int, size: int) -> Samples:
        return self.draw.batch(seed, step, size)

    def loss(self, model: Any, batch: Samples, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        frames = batch.observation.images
        if self.tokenizer is not None:
            frames = half_reconstructed(self.tokenizer, frames, generator)
        return model.loss(frames, batch.target), {}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Mean error on held-out real frames, and that of always guessing the mean."""
        samples = self.held_out.batch(0, 0, min(512, len(self.held_out)))
        error = (model(samples.observation.images) - samples.target).norm(dim=1).mean()
        trivial = (samples.target - samples.target.mean(0)).norm(dim=1).mean()
        return {"held_out_error": float(error), "guessing_the_mean": float(trivial)}

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.save_pretrained(folder, provenance=provenance)


def _target(config: TrainProbe, dataset: LeRobotDataset):
    """The target function, its outputs' names and the number of frames looked at."""
    if config.target == "action":
        names = dataset.spec.action.names

        def actions(episode: Episode) -> tuple[Tensor, Tensor]:
            # the mean over all blocks between the two frames seen
            means = episode.actions.mean(1).unfold(0, config.stride, 1).mean(-1)
            return torch.arange(config.stride, len(episode)), means

        return actions, names, 2
    if config.target == "object":
        if dataset.spec.action.embodiment != "metaworld-sawyer":
            raise DatasetError(
                f"--target object reads Meta-World states, {dataset.root} is of {dataset.spec.action.embodiment}. "
                "Use --target state --columns ..."
            )
        from worldline.sim.metaworld import object_pixels

        camera = dataset.spec.camera(config.camera)

        def pixels(episode: Episode) -> tuple[Tensor, Tensor]:
            return torch.arange(len(episode)), object_pixels(episode.states, camera)

        return pixels, (f"{config.camera}/row", f"{config.camera}/column"), 1
    if config.target == "identity":
        from worldline.eval.revisit import IDENTITIES, below_the_hand

        if dataset.spec.action.embodiment != "worldline-arm":
            raise DatasetError(
                f"--target identity reads states of arm/..., {dataset.root} is of {dataset.spec.action.embodiment}"
            )
        return lambda episode: below_the_hand(episode.states), IDENTITIES, 1
    if config.target == "pose":
        names = dataset.spec.pose_names
        if max(config.columns, default=0) >= len(names):
            raise DatasetError(
                f"{dataset.root}: --target pose needs --columns below {len(names)}, the number of pose dimensions; "
                f"got {config.columns or 'none'}, poses are {list(names)}"
            )
        columns = list(config.columns or range(len(names)))

        def poses(episode: Episode) -> tuple[Tensor, Tensor]:
            return torch.arange(len(episode)), episode.poses[:, columns]

        return poses, tuple(names[i] for i in columns), 1
    if not config.columns:
        raise DatasetError("--target state needs --columns, got none")

    def states(episode: Episode) -> tuple[Tensor, Tensor]:
        if episode.states.shape[1] <= max(config.columns):
            raise DatasetError(f"--columns {config.columns} required, the state has {episode.states.shape[1]} columns")
        return torch.arange(len(episode)), episode.states[:, list(config.columns)]

    return states, tuple(f"state[{i}]" for i in config.columns), 1


def run(config: TrainProbe, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder."""
    tokenizer = load_tokenizer(config.tokenizer).to(best_device()) if config.tokenizer else None
    options: dict[str, Any] = {"cameras": cameras_of(config.cameras, tokenizer), "stride": config.stride}
    training, held_out = (open_datasets(config.data, split, **options) for split in ("train", "held-out"))
    function, names, window = _target(config, training[0].dataset)
    camera = {"pose": config.camera, "identity": "wrist"}.get(config.target)
    draw = SampleDraw(training, function, window=window, camera=camera)
    identity = ("data", "target", "columns", "camera", "cameras", "tokenizer", "stride")
    claim_output(config.out, "probe", config, identity=identity, made_from=contents(training))
    torch.manual_seed(config.loop.seed)
    settings = ProbeConfig(target=config.target, names=names, encoder=EncoderConfig(window=window, shift=0))
    probe = Probe(settings, draw.spec, RobustNormalizer.fit(draw.targets))
    stage = _ProbeStage(probe, draw, SampleDraw(held_out, function, window=window, camera=camera), tokenizer)
    provenance = data_provenance(training, config.out)
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)
