"""Stage `world-models`: train one world model on the data of several robots.

Datasets are grouped by embodiment. Each step takes a batch of one embodiment, drawn from (seed, step) alone: batches of robots
whose cameras and actions differ cannot be stacked, and a run goes on bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.data import LeRobotDataset
from worldline.errors import SpecMismatch
from worldline.tokenizers import Tokenizer
from worldline.trainers import world_model
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
from worldline.types import Clip
from worldline.worldmodels import AutoregressiveConfig, MultiWorldModel, Robot, TransformerConfig
from worldline.worldmodels.embodiments import member_folder
from worldline.worldmodels.experts import report_routing

EXPERTS = 4


def _mixture(model: AutoregressiveConfig) -> AutoregressiveConfig:
    return replace(model, network=replace(model.network, experts=EXPERTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWorldModels:
    """Train one world model on several robots, with action experts that they share.

    Example: worldline train world-models --data data/arm data/drawer --tokenizer runs/arm-tok runs/drawer-tok --out runs/multi
    """

    data: tuple[Path, ...]
    """Dataset folders of one or several robots. Those of one embodiment are mixed by their number of frames."""
    tokenizer: tuple[Path, ...]
    """Folders of trained tokenizers: one for each embodiment, in the order in which these first appear in --data, or one
    for all. A copy is saved with each member."""
    out: Path
    """Folder for the checkpoint; each robot's world model is then OUT/members/EMBODIMENT. An interrupted run goes on there."""
    stride: int = 1
    """Dataset frames per world-model frame; action blocks grow with it."""
    frames: int = 10
    """Length of a training clip. Longer than the window, so that the cache's far edge is trained too."""
    starts: float = 0.2
    """Share of clips that begin where their episode does: there dreams begin, with one frame known and the arm at rest."""
    balance: bool = False
    """Draw every embodiment equally often, instead of by its number of frames."""
    model: AutoregressiveConfig = field(
        default_factory=lambda: AutoregressiveConfig(network=TransformerConfig(experts=EXPERTS))
    )
    max_episodes: int | None = None
    """Use only the first so many training episodes of each dataset."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        window = self.model.network.window
        world_model.check_clips(self.frames, window, self.starts, self.max_episodes, stride=self.stride)


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (
        f"{text}; {EXPERTS} experts; steps are shared by the robots",
        {**settings, "model": _mixture(settings["model"])},
    )
    for name, (text, settings) in world_model.PRESETS.items()
}


class _WorldModelsStage:
    name = "world-models"

    def __init__(
        self,
        model: MultiWorldModel,
        batches: Mapping[str, LatentBatches],
        held_out: Mapping[str, LatentBatches],
        tokenizers: Mapping[str, Tokenizer],
        *,
        balance: bool,
        of_members: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.model, self.batches, self.held_out, self.tokenizers = model, batches, held_out, tokenizers
        self.of_members = of_members
        self.shares = _shares([b.selections for b in batches.values()], balance=balance)

    def batch(self, seed: int, step: int, size: int) -> dict[str, Clip]:
        """One embodiment's clips."""
        generator = torch.Generator().manual_seed((seed * 5_915_587 + step * 2 + 1) & 0x7FFF_FFFF_FFFF)
        which = int(torch.multinomial(self.shares, 1, generator=generator))
        name = list(self.batches)[which]
        return {name: self.batches[name].batch(seed, step, size)}

    def loss(
        self, model: Any, batch: Mapping[str, Clip], generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return model.loss(batch, generator)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """For each embodiment what `world-model` measures, and how its actions are routed to experts."""
        measured: dict[str, dict[str, float]] = {}
        routings = {}
        for name, held_out in self.held_out.items():
            clip, member = held_out.batch(0, 0, 16), model.member(name)
            measured[name] = world_model.imagined_errors(member, clip)
            if model.network.experts is not None:
                routings[name] = [member.routing(clip)]
        found = {f"{key}/{name}": row[key] for key in next(iter(measured.values())) for name, row in measured.items()}
        if routings:
            report = report_routing(routings)
            for name, row in report["embodiments"].items():
                found[f"routing_entropy/{name}"] = row["entropy"]
                found |= {f"expert_load/{name}/{i}": share for i, share in enumerate(row["load"])}
            found["routing_information"] = report["information"]
        return found

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.save_pretrained(folder, provenance=provenance, of_members=self.of_members)
        for name, tokenizer in self.tokenizers.items():
            beside = member_folder(folder, name) / "tokenizer"
            if not (beside / "config.json").is_file():
                tokenizer.save_pretrained(beside)


def run(config: TrainWorldModels, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder.

    Raises `SpecMismatch` if the tokenizers do not fit the data, before anything is encoded.
    """
    groups = _by_embodiment(config.data)
    tokenizers = _tokenizers(config.tokenizer, groups)
    training, held_out = (
        {
            name: open_datasets(roots, split, cameras=[c.name for c in tokenizers[name].cameras], max_episodes=episodes)
            for name, roots in groups.items()
        }
        for split, episodes in (("train", config.max_episodes), ("held-out", None))
    )
    claim_output(
        config.out,
        "world-models",
        config,
        identity=("data", "tokenizer", "stride", "frames", "starts", "balance", "model", "max_episodes"),
        made_from={f"tokenizer of {name}": tokenizer.fingerprint for name, tokenizer in tokenizers.items()}
        | contents([s for chosen in training.values() for s in chosen]),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"frames": config.frames, "stride": config.stride, "device": device, "progress": progress}
    for chosen in training.values():
        world_model.require_history(chosen, config.stride, config.model.network)
    batches = {
        name: LatentBatches(
            chosen,
            tokenizers[name],
            starts=config.starts,
            lead=world_model.lead_of(config.model.network, chosen[0].dataset.spec),
            **options,
        )
        for name, chosen in training.items()
    }
    normalizers = {name: fit_normalizers(chosen) for name, chosen in training.items()}
    robots = {
        name: Robot(spec=batches[name].spec, action_normalizer=actions, pose_normalizer=poses)
        for name, (actions, poses) in normalizers.items()
    }
    torch.manual_seed(config.loop.seed)
    model = MultiWorldModel(config.model, robots)
    for name, chosen in training.items():
        model.member(name).fit_aims(strided_numbers(chosen, config.stride))
    of_members = {
        name: {**data_provenance(chosen, member_folder(config.out, name)), "tokenizer": tokenizers[name].fingerprint}
        for name, chosen in training.items()
    }
    stage = _WorldModelsStage(
        model,
        batches,
        {name: LatentBatches(chosen, tokenizers[name], **options) for name, chosen in held_out.items()},
        tokenizers,
        balance=config.balance,
        of_members=of_members,
    )
    provenance = {
        **data_provenance([s for chosen in training.values() for s in chosen], config.out),
        "embodiments": list(robots),
        "tokenizers": {name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()},
        "weights": sum(p.numel() for p in model.parameters()),
    }
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)


def _shares(groups: Sequence[Sequence[Selection]], *, balance: bool) -> Tensor:
    """How often each embodiment is drawn, up to a factor: by its number of frames, or evenly."""
    frames = [float(sum(s.dataset.length(i) for s in selections for i in s.episodes)) for selections in groups]
    return torch.ones(len(frames)) if balance else torch.tensor(frames)


def _by_embodiment(data: Sequence[Path]) -> dict[str, list[Path]]:
    """Datasets by the robot that they are of, in the order of --data."""
    if not data:
        raise SpecMismatch("at least one dataset folder is required after --data, got none")
    groups: dict[str, list[Path]] = {}
    for root in data:
        groups.setdefault(LeRobotDataset(root).spec.action.embodiment, []).append(root)
    return groups


def _tokenizers(folders: Sequence[Path], groups: Mapping[str, Sequence[Path]]) -> dict[str, Tokenizer]:
    """Embodiment -> its tokenizer. Raises `SpecMismatch` if their number or their cameras do not fit the data."""
    if len(folders) not in (1, len(groups)):
        listing = "\n".join(f"  {name}: {', '.join(map(str, roots))}" for name, roots in groups.items())
        raise SpecMismatch(
            f"--tokenizer: one folder for each of these {len(groups)} embodiments, in this order, or one for all is required, got "
            f"{len(folders)}:\n{listing}"
        )
    chosen = {}
    for i, (name, roots) in enumerate(groups.items()):
        folder = folders[i % len(folders)]
        chosen[name] = load_finished_tokenizer(folder)
        for root in roots:
            have = {c.name: c for c in LeRobotDataset(root).spec.cameras}
            wrong = [
                f"  camera {c.name}: required {c.height}x{c.width}, got "
                + (f"{have[c.name].height}x{have[c.name].width}" if c.name in have else "none")
                for c in chosen[name].cameras
                if have.get(c.name) != c
            ]
            if wrong:
                raise SpecMismatch(
                    f"tokenizer {folder} does not fit {root} (embodiment {name}):\n" + "\n".join(wrong) + "\n"
                    "Name one tokenizer for each embodiment, in the order in which these first appear in --data."
                )
    return chosen
