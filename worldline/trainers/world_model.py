"""Stage `world-model`: train the autoregressive denoiser on cached latents."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.data.clips import strided
from worldline.diffusion import LevelDistribution
from worldline.errors import SpecMismatch
from worldline.tokenizers import Tokenizer, whiten
from worldline.trainers.inputs import (
    LatentBatches,
    Selection,
    claim_output,
    contents,
    data_provenance,
    fit_normalizers,
    load_finished_tokenizer,
    open_datasets,
    strided_numbers,
)
from worldline.trainers.loop import LoopConfig, train
from worldline.types import Clip, WorldSpec, require_match
from worldline.worldmodels import AutoregressiveConfig, AutoregressiveWorldModel, TrainedWorldModel, TransformerConfig

log = logging.getLogger(__name__)

WHOLE = 1_000_000  # frames


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWorldModel:
    """Train an action-conditioned world model on a dataset.

    Example: worldline train world-model --data data/drawer --tokenizer runs/tok --preset tiny --out runs/wm
    """

    data: tuple[Path, ...]
    """Dataset folders; several are mixed by their number of frames."""
    tokenizer: Path
    """Folder of a trained tokenizer. A copy is saved beside the world model."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    stride: int = 1
    """Dataset frames per world-model frame; action blocks grow with it."""
    frames: int = 10
    """Length of a training clip. Longer than the window, so that the cache's far edge is trained too."""
    starts: float = 0.2
    """Share of clips that begin where their episode does: there dreams begin, with one frame known and the arm at rest."""
    model: AutoregressiveConfig = field(default_factory=AutoregressiveConfig)
    init_from: Path | None = None
    """Start from the weights of another world model of the same spec. Its network's sizes, its normalisation and its text encoder
    (--model.text) are kept, everything else is as said here."""
    max_episodes: int | None = None
    """Use only the first so many training episodes of each dataset."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        # with weights from elsewhere their window counts, once they are read
        window = self.model.network.window if self.init_from is None else 1
        check_clips(self.frames, window, self.starts, self.max_episodes, stride=self.stride)


def check_clips(
    frames: int,
    window: int,
    starts: float,
    max_episodes: int | None,
    *,
    stride: int,
    flag: str = "--model.network.window",
) -> None:
    """Raise `ValueError` for settings of training clips that cannot be. `flag` sets the window: the frames of history and the next."""
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if frames < window:
        raise ValueError(
            "clips of at least as many frames as the window required, or its far end is never trained: got "
            f"--frames {frames} and {flag} {window}"
        )
    if not 0 <= starts <= 1:
        raise ValueError(f"starts must be a share from 0 to 1, got {starts}")
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes must be at least 1, got {max_episodes}")


def _model(width: int, depth: int, heads: int, window: int) -> AutoregressiveConfig:
    return AutoregressiveConfig(network=TransformerConfig(width=width, depth=depth, heads=heads, window=window))


# Short trainings for one solver step: most targets stand at pure noise, where that step starts, all weigh the same, and
# small batches buy more steps (docs/log.md has the measurements).
_FAST = {"target": LevelDistribution(pure=0.8, low=0.02), "max_weight": 1.0}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "2M weights; ten minutes on a 2-core CPU for a first dream, an hour or two for a good one",
        {
            "model": replace(_model(128, 4, 4, 8), **_FAST),
            "loop": LoopConfig(
                steps=3000, batch_size=4, lr=1.5e-3, optimizer="muon", muon_lr=3e-3, ema=0.995, cooldown=0.4
            ),
        },
    ),
    "small": (
        "54M weights; a night on one consumer GPU",
        {
            "model": _model(512, 8, 8, 12),
            "frames": 16,
            "loop": LoopConfig(steps=60_000, batch_size=32, lr=4e-4, ema=0.9995),
        },
    ),
    "base": (
        "425M weights, three views of 192x320; days on one data-centre GPU",
        {
            "model": _model(1024, 16, 16, 12),
            "frames": 16,
            "loop": LoopConfig(steps=200_000, batch_size=32, lr=2e-4, ema=0.9999),
        },
    ),
    "large": (
        "1.5B weights; many GPUs under `accelerate launch`",
        {
            "model": _model(1536, 26, 24, 16),
            "frames": 20,
            "loop": LoopConfig(steps=300_000, batch_size=8, lr=1e-4, ema=0.9999),
        },
    ),
}


class WorldModelStage:
    """How the loop trains a world model of any kind on one robot's latents."""

    def __init__(
        self,
        model: TrainedWorldModel,
        batches: LatentBatches,
        held_out: LatentBatches,
        tokenizer: Tokenizer,
        *,
        name: str = "world-model",
    ) -> None:
        self.name = name
        self.model, self.batches, self.held_out, self.tokenizer = model, batches, held_out, tokenizer

    def batch(self, seed: int, step: int, size: int) -> Clip:
        return self.batches.batch(seed, step, size)

    def loss(self, model: Any, batch: Clip, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return model.loss(batch, generator)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        return imagined_errors(model, self.held_out.batch(0, 0, 16))

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.save_pretrained(folder, provenance=provenance)
        if not (folder / "tokenizer" / "config.json").is_file():
            self.tokenizer.save_pretrained(folder / "tokenizer")


@torch.no_grad()
def imagined_errors(model: TrainedWorldModel, clip: Clip) -> dict[str, float]:
    """Rollout from a clip's first frame to its end: error against copying it, and of shuffled actions against true ones."""
    rows = len(clip.poses)
    first = replace(
        clip, frames={c: z[:, :1] for c, z in clip.frames.items()}, actions=clip.actions[:, :0], poses=clip.poses[:, :1]
    )
    seeds = torch.arange(rows)
    state: Any = model.observe(first)
    target = whiten({c: z[:, 1:] for c, z in clip.frames.items()}, model.latent_spec)

    def error(latents: Mapping[str, Tensor]) -> float:
        white = whiten({c: z.cpu() for c, z in latents.items()}, model.latent_spec)
        return float(torch.stack([(white[c] - target[c]).square().mean() for c in target]).mean())

    copied = error({c: z[:, :1].expand(-1, clip.actions.shape[1], -1, -1, -1) for c, z in clip.frames.items()})
    true = error(model.imagine(state, clip.actions, seeds=seeds)[1].latents)
    shuffled = error(model.imagine(state, clip.actions.roll(1, 0), seeds=seeds)[1].latents)
    tiny = 1e-12  # clips in which nothing moves
    return {"error_vs_copy": true / max(copied, tiny), "shuffled_vs_true": shuffled / max(true, tiny)}


def require_history(selections: Sequence[Selection], stride: int, network: TransformerConfig) -> None:
    """Raise `DatasetError` if the episodes are too short for the network's memory."""
    longest = max(s.dataset.length(i) for s in selections for i in s.episodes)
    source = str(selections[0].dataset.root)
    network.memory.require_history((longest - 1) // stride + 1, network.window, source=source)


def lead_of(network: TransformerConfig, spec: WorldSpec) -> int:
    """How many frames before a training clip come along: all there are, where a memory is shown them or commands are added up."""
    adds_up = network.aim and network.actions and network.guess_width and spec.action.kind != "absolute"
    return WHOLE if network.memory.size or adds_up else 0


def run(config: TrainWorldModel, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder."""
    tokenizer = load_finished_tokenizer(config.tokenizer)
    cameras = [c.name for c in tokenizer.cameras]
    training = open_datasets(config.data, "train", cameras=cameras, max_episodes=config.max_episodes)
    held_out = open_datasets(config.data, "held-out", cameras=cameras)
    model = (
        None if config.init_from is None else _trained(config, config.init_from, tokenizer, training[0].dataset.spec)
    )
    claim_output(
        config.out,
        "world-model",
        config,
        identity=("data", "tokenizer", "stride", "frames", "starts", "model", "max_episodes", "init_from"),
        made_from={"tokenizer's weights": tokenizer.fingerprint, **contents(training)},
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"frames": config.frames, "stride": config.stride, "device": device, "progress": progress}
    network = (config.model if model is None else model.config).network
    require_history(training, config.stride, network)
    lead = lead_of(network, training[0].dataset.spec)
    batches = LatentBatches(training, tokenizer, starts=config.starts, lead=lead, **options)
    if model is None:
        torch.manual_seed(config.loop.seed)
        actions, poses = fit_normalizers(training)
        model = AutoregressiveWorldModel(config.model, batches.spec, action_normalizer=actions, pose_normalizer=poses)
        model.fit_aims(strided_numbers(training, config.stride))
    stage = WorldModelStage(model, batches, LatentBatches(held_out, tokenizer, **options), tokenizer)
    provenance = {
        **data_provenance(training, config.out, init_from=config.init_from),
        "tokenizer": tokenizer.fingerprint,
        "init_from": str(config.init_from) if config.init_from else None,
        "weights": sum(p.numel() for p in model.parameters()),
    }
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)


def _trained(config: TrainWorldModel, folder: Path, tokenizer: Tokenizer, data: WorldSpec) -> AutoregressiveWorldModel:
    """The model to go on from, with the settings of `config` for all but its network and the text encoder that this was made for. Raises
    `SpecMismatch` if it was trained with another tokenizer or on data of another kind, or if settings do not go with its network."""
    model = AutoregressiveWorldModel.from_pretrained(folder)
    if model.latent_spec != tokenizer.latent_spec:
        raise SpecMismatch(
            f"--init-from {folder}: the tokenizer it was trained with is required ({model.latent_spec.fingerprint}), got "
            f"{tokenizer.fingerprint} in {config.tokenizer}. A world model's folder keeps its own in tokenizer/: use "
            f"--tokenizer {folder}/tokenizer."
        )
    fields = ("cameras", "fps", "control_steps", "action", "pose_names")
    require_match(
        strided(data, config.stride), model.spec, between=f"{config.data[0]} and --init-from {folder}", only=fields
    )
    network, text = model.config.network, model.config.text
    if config.model.text not in ("none", text):  # none is what a user says who says nothing
        raise SpecMismatch(
            f"--init-from {folder}: --model.text {text} required, which its network was made for, got {config.model.text}. Leave the flag "
            "out to go on with what it has, or train from the start."
        )
    if config.frames < network.window:
        raise SpecMismatch(
            f"--init-from {folder}: clips of at least as many frames as its window ({network.window}) required, or its far end is never "
            f"trained: got --frames {config.frames}"
        )
    try:
        model.config = replace(config.model, network=network, text=text)
    except ValueError as error:  # a setting that its network cannot follow
        raise SpecMismatch(f"--init-from {folder}: {error}") from error
    return model
