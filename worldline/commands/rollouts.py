"""What `rank` rolls out, in imagination and in the simulator, and where it keeps it.

Every rollout is kept in the output folder as soon as it is done, under a hash of everything it depends on: an interrupted
ranking goes on, and a ranking with one more policy rolls out that one alone.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.checkpoint import read_tensors, resolve, to_json, weights_file, write_tensors
from worldline.commands.acting import planning_folders
from worldline.errors import WorldlineError
from worldline.policies import CallablePolicy, Corrupted
from worldline.policies.remote import RemotePolicy
from worldline.rl_in_imagination.planning import BestOfN
from worldline.sim.base import make_world
from worldline.sim.record import episode_seed
from worldline.sim.rollout import RolloutResult, rollout_actions, rollout_policy
from worldline.sim.workers import WorldPool
from worldline.types import Observation, Policy, WorldSpec, require_match

TRUTH_STREAM = 777_000  # truth starts come from recordings numbered from here: no dataset is recorded with such a seed


class Kept:
    """Tensors on disk under a hash of what they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, key: Sequence[Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        path = self.folder / f"{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:20]}.safetensors"
        if not path.is_file():
            write_tensors(path, make())
        return read_tensors(path)


# --- identities -------------------------------------------------------------------------------------------------------


def weights_of(folder: str | Path) -> str:
    """Hash of a checkpoint: weights, config, spec, and those of a tokenizer saved beside it."""
    digest, root = hashlib.sha256(), resolve(folder)
    for part in (root, root / "tokenizer"):
        for name in ("model.safetensors", "config.json", "spec.json"):
            path = weights_file(part) if name == "model.safetensors" else part / name
            digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def identity_of(name: str, policy: Policy) -> list[Any]:
    """What says that a policy is the same one as before.

    A checkpoint is its files, a function its module's source, a served policy its address and what the server declares; of one that plans
    those of scorer and dream too.
    """
    base, _, options = name.partition("@")
    inner = policy.policy if isinstance(policy, Corrupted | BestOfN) else policy
    planned = [weights_of(folder) for folder in planning_folders(name)]
    if isinstance(inner, RemotePolicy):
        return [base, inner.hello.name, to_json(inner.hello), options, *planned]
    if isinstance(inner, CallablePolicy):
        found = importlib.util.find_spec(base.partition(":")[0])
        source = Path(found.origin).read_bytes() if found and found.origin and Path(found.origin).is_file() else b""
        return [base, hashlib.sha256(source).hexdigest()[:16], options, *planned]
    return [weights_of(base), options, *planned]


def fingerprint_of(starts: Observation) -> str:
    """Sixteen hex digits of first frames, poses and instructions."""
    digest = hashlib.sha256(starts.pose.numpy().tobytes())
    digest.update(json.dumps(starts.instruction).encode())
    for camera in sorted(starts.images):
        digest.update(starts.images[camera].numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_of_tensor(x: Tensor) -> str:
    """Sixteen hex digits of a tensor's shape and values."""
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- truth ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthSettings:
    """A simulator as the world model knows it, and how it is used."""

    world: str
    spec: WorldSpec
    episodes: int
    starts: int  # at least `episodes`: imagination may start more often than the simulator
    horizon: int
    frames: int
    seed: int
    processes: int

    @property
    def options(self) -> dict[str, Any]:
        return {
            "cameras": [c.name for c in self.spec.cameras],
            "size": self.spec.cameras[0].height,
            "horizon": self.horizon,
            "control_steps": self.spec.control_steps,
        }

    @property
    def seeds(self) -> list[int]:
        return [episode_seed(TRUTH_STREAM + self.seed, i) for i in range(self.starts)]


def check_truth(settings: TruthSettings) -> None:
    """Raise at once what `Truth` would raise hours later: `SimulatorError` for an unknown name, `SpecMismatch` for another world."""
    world = make_world(settings.world, **settings.options)
    try:
        require_match(world.spec, settings.spec, between=f"simulator {settings.world} and world model")
    finally:
        world.close()


class Truth:
    """True rollouts of policies, from starts that imagination shares. Raises `SpecMismatch` for another simulator's data."""

    def __init__(self, settings: TruthSettings, kept: Kept) -> None:
        self.settings, self.kept = settings, kept
        self.pool = WorldPool(settings.world, rows=8, processes=settings.processes, **settings.options)
        try:
            require_match(self.pool.spec, settings.spec, between=f"simulator {settings.world} and world model")
        except WorldlineError:
            self.pool.close()
            raise

    def __enter__(self) -> "Truth":
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.close()

    def starts(self) -> Observation:
        """First frames, poses and instructions of every start."""
        frames, told, seeds = [], [], self.settings.seeds
        for i in range(0, len(seeds), self.pool.rows):
            wave = self.pool.reset(dict(enumerate(seeds[i : i + self.pool.rows])))
            frames += [wave[row] for row in sorted(wave)]
            told += self.pool.instructions(sorted(wave)).values()
        return Observation(
            images={c: torch.stack([f.images[c] for f in frames]) for c in frames[0].images},
            pose=torch.stack([f.pose for f in frames]),
            instruction=tuple(told),
        )

    def frame_success(
        self, identity: Sequence[Any], policy: Policy, *, episodes: int | None = None, progress: str | None
    ) -> Tensor:
        """Success of every frame, "r t" bool. An episode that ended keeps what its last frame was.

        `identity` says what rollouts must come from to be used again.
        """
        s, seeds = self.settings, self.settings.seeds[: episodes or self.settings.episodes]

        def roll() -> dict[str, Tensor]:
            return self._labels(rollout_policy(self.pool, policy, seeds=seeds, progress=progress))

        key = ["truth", s.world, s.options, list(identity), seeds]
        return self.kept(key, roll)["frame_success"][:, : s.frames]

    def success_of_actions(self, actions: Tensor, *, progress: str | None) -> Tensor:
        """Success of every frame, "r t" bool, of given action blocks "r t-1 k a" from the first r starts."""
        s, seeds = self.settings, self.settings.seeds[: len(actions)]
        key = ["given actions", s.world, s.options, fingerprint_of_tensor(actions), seeds]
        made = self.kept(key, lambda: self._labels(rollout_actions(self.pool, actions, seeds=seeds, progress=progress)))
        return made["frame_success"][:, : s.frames]

    def _labels(self, found: Sequence[RolloutResult]) -> dict[str, Tensor]:
        s = self.settings
        labels = [r.frame_success for r in found if r.frame_success is not None]
        if len(labels) < len(found):
            raise WorldlineError(
                f"--truth {s.world}: a simulator that tells success is required, this one does not. "
                "Leave --truth out and give --data."
            )
        length = s.horizon // s.spec.control_steps + 1
        return {"frame_success": torch.stack([_held(label, length) for label in labels])}

    def videos(self, policy: Policy, count: int) -> list[dict[str, Tensor]]:
        """Every frame of the first `count` episodes, as long as an imagined one: the last frame is held."""
        found: list[RolloutResult] = rollout_policy(
            self.pool, policy, seeds=self.settings.seeds[:count], keep_frames=True
        )
        return [{c: _held(x, self.settings.frames) for c, x in (r.frames or {}).items()} for r in found]


def _held(frames: Tensor, length: int) -> Tensor:
    """The first `length` rows, the last one repeated where there are fewer."""
    return frames[torch.arange(length).clamp(max=len(frames) - 1)]
