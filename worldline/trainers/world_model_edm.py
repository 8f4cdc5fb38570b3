"""Stage `world-model-edm`: train World4RL's U-Net transition model on cached latents.

A stage of its own rather than a `--kind` of `world-model`: the two share the loop, the batches and the evaluation, but hardly an option,
and each stage's help lists what its model has. Every verb takes either checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from worldline.diffusion import LogNormalSigmas
from worldline.trainers.inputs import (
    LatentBatches,
    claim_output,
    contents,
    data_provenance,
    fit_normalizers,
    load_finished_tokenizer,
    open_datasets,
)
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.world_model import WorldModelStage, check_clips
from worldline.worldmodels import EDMConfig, EDMWorldModel
from worldline.worldmodels.edm_unet import stackable_shapes

FITTED_ON = 256  # clips whose changes set the scale of what is diffused


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWorldModelEDM:
    """Train a U-Net that denoises the next frame from the last four and their actions, with EDM's noise (World4RL).

    Example: worldline train world-model-edm --data data/drawer --tokenizer runs/tok --preset tiny --out runs/wm-edm
    """

    data: tuple[Path, ...]
    """Dataset folders; several are mixed by their number of frames."""
    tokenizer: Path
    """Folder of a trained tokenizer. A copy is saved beside the world model. Latents of all cameras must be of one height and width."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    stride: int = 1
    """Dataset frames per world-model frame; action blocks grow with it."""
    frames: int = 8
    """Length of a training clip. Every frame but the first is a target, the first few with a history that is still short."""
    starts: float = 0.2
    """Share of clips that begin where their episode does: there dreams begin, with one frame known and the arm at rest."""
    model: EDMConfig = field(default_factory=EDMConfig)
    max_episodes: int | None = None
    """Use only the first so many training episodes of each dataset."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_clips(
            self.frames,
            self.model.history + 1,
            self.starts,
            self.max_episodes,
            stride=self.stride,
            flag="--model.history, with the next frame,",
        )
        if self.loop.optimizer == "muon":
            raise ValueError("optimizer: adamw required for a U-Net of convolutions, got muon")


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "2M weights; minutes on a 2-core CPU for a first dream",
        {
            # half of the targets stand where the solver starts, and it takes one step: short trainings learn the first step well
            # and the later ones not (docs/log.md)
            "model": EDMConfig(sigmas=LogNormalSigmas(pure=0.5), solver_steps=1),
            "loop": LoopConfig(steps=3000, batch_size=4, lr=1e-3, ema=0.995, cooldown=0.4),
        },
    ),
    "base": (
        "about 330M weights, the size of the paper's; days on several data-centre GPUs",
        {
            "model": EDMConfig(
                target="frame",
                block_out_channels=(256, 512, 768, 896), layers_per_block=2, attended=2, head_width=64, norm_groups=32,
                pose_width=512,
            ),
            "loop": LoopConfig(steps=200_000, batch_size=16, lr=1e-4, ema=0.9999),
        },
    ),
}  # fmt: skip


def run(config: TrainWorldModelEDM, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder. Raises `SpecMismatch` if the cameras' latents cannot be stacked."""
    tokenizer = load_finished_tokenizer(config.tokenizer)
    cameras = [c.name for c in tokenizer.cameras]
    training = open_datasets(config.data, "train", cameras=cameras, max_episodes=config.max_episodes)
    held_out = open_datasets(config.data, "held-out", cameras=cameras)
    stackable_shapes(tokenizer.latent_spec)  # before an hour of encoding
    claim_output(
        config.out,
        "world-model-edm",
        config,
        identity=("data", "tokenizer", "stride", "frames", "starts", "model", "max_episodes"),
        made_from={"tokenizer's weights": tokenizer.fingerprint, **contents(training)},
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"frames": config.frames, "stride": config.stride, "device": device, "progress": progress}
    batches = LatentBatches(training, tokenizer, starts=config.starts, **options)
    torch.manual_seed(config.loop.seed)
    actions, poses = fit_normalizers(training)
    model = EDMWorldModel(config.model, batches.spec, action_normalizer=actions, pose_normalizer=poses)
    model.fit_change(batches.batch(config.loop.seed, 0, FITTED_ON))
    stage = WorldModelStage(
        model, batches, LatentBatches(held_out, tokenizer, **options), tokenizer, name="world-model-edm"
    )
    provenance = {
        **data_provenance(training, config.out),
        "tokenizer": tokenizer.fingerprint,
        "weights": sum(p.numel() for p in model.parameters()),
    }
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)
