"""One world model for several robots: a shared trunk, a port for each embodiment, and experts that embed their actions.

`member(embodiment)` is that robot's whole world model: a view of the shared weights with its own spec and its own normalisation.
Cameras, poses, action dims, control steps and frame rates may all differ; what is learned of one robot's motion reaches another
through the trunk and the experts (`experts`).

On disk (every verb takes a member's folder):

    runs/multi/                              config.json, spec.json (embodiment -> spec), model.safetensors: the shared weights
    runs/multi/members/<embodiment>/         config.json (normalisation), spec.json, tokenizer/

The folder can be moved as a whole; a member's folder alone holds no weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer, normalizers_from_json, normalizers_to_json
from worldline.errors import CheckpointError, SpecMismatch
from worldline.types import Clip, WorldSpec
from worldline.worldmodels.autoregressive import AutoregressiveWorldModel, body_of, make_network, read_config
from worldline.worldmodels.config import AutoregressiveConfig
from worldline.worldmodels.experts import ROUTERS
from worldline.worldmodels.transformer import port_key

PART, KIND = "world-models", "multi"
MEMBER_PART, MEMBER_KIND = "world-model", "member"


@dataclass(frozen=True, slots=True, kw_only=True)
class Robot:
    """What a world model must know of one embodiment: its data's spec (with latents), and how its numbers are scaled."""

    spec: WorldSpec
    action_normalizer: RobustNormalizer
    pose_normalizer: RobustNormalizer


class MultiWorldModel(nn.Module):
    """One network for several robots.

    Args:
        config: sizes and levels, alike for all; `config.network.experts` > 0 for a mixture of action experts, else each port
            embeds its own actions.
        robots: embodiment (`spec.action.embodiment`) -> what is known of it. Their order is the embodiments' number.

    Raises `SpecMismatch` if a name is not its spec's embodiment, or two cannot be told apart on disk.
    """

    def __init__(self, config: AutoregressiveConfig, robots: Mapping[str, Robot]) -> None:
        super().__init__()
        _require_names(robots)
        self.config, self.robots = config, dict(robots)
        self.network = make_network(config, {name: body_of(robot.spec) for name, robot in robots.items()})
        if self.network.experts is not None:
            self.network.experts.check_router(config.router)

    @property
    def embodiments(self) -> tuple[str, ...]:
        return tuple(self.robots)

    def member(self, embodiment: str) -> AutoregressiveWorldModel:
        """The world model of one embodiment. It shares these weights. Raises `SpecMismatch` naming those there are."""
        if embodiment not in self.robots:
            raise SpecMismatch(
                f"embodiment: one of {', '.join(self.robots)} required, which this world model was made for, got {embodiment!r}"
            )
        robot = self.robots[embodiment]
        member = AutoregressiveWorldModel(
            self.config,
            robot.spec,
            action_normalizer=robot.action_normalizer,
            pose_normalizer=robot.pose_normalizer,
            network=self.network,
            body=embodiment,
        )
        # not train(): that would reach into the shared network
        member.training = self.training
        return member

    def loss(
        self, clips: Mapping[str, Clip], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of each embodiment's clip of raw latents, and detached metrics named `<metric>/<embodiment>`."""
        if not clips:
            raise SpecMismatch(f"loss: a clip of at least one of {', '.join(self.robots)} required, got none")
        losses, metrics = [], {}
        for embodiment, clip in clips.items():
            loss, shown = self.member(embodiment).loss(clip, generator)
            losses.append(loss)
            metrics |= {f"{name}/{embodiment}": value for name, value in shown.items()}
        return torch.stack(losses).mean(), metrics

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The trunk's matrices: what Muon may train."""
        return self.member(self.embodiments[0]).hidden_matrices()

    # --- storage ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        provenance: Mapping[str, Any] | None = None,
        of_members: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write the shared weights and the members' folders; their tokenizers belong in `member_folder(...)/tokenizer`.

        `of_members`: embodiment -> what is to be said of its origin besides `provenance`.
        """
        folder = Path(folder)
        for name, robot in self.robots.items():
            checkpoint.save_part(
                member_folder(folder, name),
                part=MEMBER_PART,
                kind=MEMBER_KIND,
                config={
                    "embodiment": name,
                    **normalizers_to_json(robot.action_normalizer, robot.pose_normalizer),
                },
                spec=robot.spec,
                tensors="../../model.safetensors",
                provenance={**(provenance or {}), **((of_members or {}).get(name, {}))},
            )
        checkpoint.save_part(
            folder,
            part=PART,
            kind=KIND,
            config={"model": checkpoint.to_json(self.config), "embodiments": list(self.robots)},
            spec={name: checkpoint.to_json(robot.spec) for name, robot in self.robots.items()},
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MultiWorldModel":
        """All of it, in evaluation mode. Raises `CheckpointError` if anything is missing or does not fit."""
        folder = checkpoint.resolve(folder)
        config = checkpoint.load_config(folder, part=PART)["config"]
        source = f"{folder}/config.json"
        robots = {name: _read_robot(member_folder(folder, name)) for name in config["embodiments"]}
        model = cls(read_config(config["model"], source), robots)
        checkpoint.load_tensors(model, folder)
        return model.eval()


def load_member(folder: str | Path) -> AutoregressiveWorldModel:
    """The world model of one embodiment from its folder `.../members/<embodiment>`, with the weights that all share."""
    folder = Path(folder)
    config = checkpoint.load_config(folder, part=MEMBER_PART)["config"]
    root = checkpoint.weights_file(folder).parent
    return MultiWorldModel.from_pretrained(root).member(config["embodiment"])


def member_folder(folder: str | Path, embodiment: str) -> Path:
    """Where a member is kept. Characters that file systems may not take become `-`."""
    return Path(folder) / "members" / re.sub(r"[^\w.+-]", "-", embodiment)


def require_one(folder: Path) -> None:
    """Raise `CheckpointError` naming the members if `folder` holds several world models, where one is required."""
    if (folder / "config.json").is_file():
        about = checkpoint.read_json(folder / "config.json")
        if about.get("part") == PART:
            members = "\n".join(f"  {member_folder(folder, name)}" for name in about["config"]["embodiments"])
            raise CheckpointError(
                f"{folder}: one world model is required here, this holds several. Name one of its members:\n{members}"
            )


def _read_robot(folder: Path) -> Robot:
    config = checkpoint.load_config(folder, part=MEMBER_PART)["config"]
    source = f"{folder}/config.json"
    return Robot(
        spec=checkpoint.from_json(WorldSpec, checkpoint.read_json(folder / "spec.json"), source=f"{folder}/spec.json"),
        **normalizers_from_json(config, source=source),
    )


def _require_names(robots: Mapping[str, Robot]) -> None:
    if not robots:
        raise SpecMismatch("a world model of several robots requires at least one, got none")
    for name, robot in robots.items():
        if name != robot.spec.action.embodiment:
            raise SpecMismatch(
                f"embodiment: the name in its spec is required, {robot.spec.action.embodiment!r}, got {name!r}"
            )
        if name in ROUTERS or hasattr(nn.ModuleDict, port_key(name)) or not name.strip("."):
            raise SpecMismatch(
                f"embodiment: {name!r} cannot be used as a name here. Record the data under another one."
            )
    for place in (port_key, lambda name: member_folder("", name).name.lower()):
        if len({place(name) for name in robots}) < len(robots):
            raise SpecMismatch(
                f"embodiments: names that differ in letters and digits required, got {', '.join(robots)}"
            )
