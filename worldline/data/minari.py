"""Minari datasets in and out: the episodes of offline RL, as `Trajectories`.

    data = read_minari("mujoco/hopper/medium-v0", spec=make_control("hopper").spec)   # a Minari id
    write_minari(imagined, Path("runs/imagined"))                                     # a folder

A `str` is a Minari id and lives in Minari's own local storage (`MINARI_DATASETS_PATH`, else ~/.minari/datasets); a `Path` is
a folder, which holds what Minari would keep there (data/main_data.hdf5, data/metadata.json). Nothing here uses the network.

Three choices to know. Numbers are float32 on the way in and out. Minari stores an episode as one chain of t+1 observations, so
only trajectories whose next observation is the following step's observation can be written. What Minari has no place for, the
spec and each episode's provenance (scores with it), is kept in the metadata of dataset and episode, and read back from there.
"""

import difflib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from worldline.checkpoint import from_json, to_json
from worldline.data.trajectories import Trajectories, control_spec
from worldline.errors import DatasetError
from worldline.types import WorldSpec

SPEC = "worldline_spec"  # in the dataset's metadata
PROVENANCE = "provenance"  # in an episode's metadata: JSON text
_ID = re.compile(r"([-\w]+/)*[-\w]+-v\d+")


def read_minari(
    source: str | Path, *, episodes: Iterable[int] | None = None, spec: WorldSpec | None = None
) -> Trajectories:
    """The episodes of a Minari dataset, in physical units.

    An episode that ends without termination is truncated, whether Minari says so or the recording just stops.

    Args:
        source: a folder, or the id of a dataset that Minari has on this machine. An existing folder goes before an id.
        episodes: which to read, in that order; None reads all.
        spec: what the numbers are. Default: what `write_minari` stored; for datasets of others the environment's id, the
            range of the action space, observations o0, o1, ..., and 1 Hz, since Minari does not keep the control rate.

    Raises:
        DatasetError: there is no such dataset or episode; observations or actions that are not vectors of numbers; whatever
            `Trajectories` refuses (NaN, actions outside their range, a termination in the middle).
    """
    minari = _minari()
    folder = _folder_of(minari, source)
    try:
        dataset = minari.MinariDataset(folder)
    except (ValueError, OSError) as error:
        raise DatasetError(f"{source}: a readable Minari dataset required, got: {error}") from error
    _vector(dataset.observation_space, "observations", source)
    box = _vector(dataset.action_space, "actions", source)
    chosen = list(range(len(dataset)) if episodes is None else episodes)
    if not chosen or min(chosen) < 0 or max(chosen) >= len(dataset):
        raise DatasetError(f"{source}: episodes among 0 .. {len(dataset) - 1} required, got {chosen or 'none'}.")
    about = dataset.storage.metadata
    stored = from_json(WorldSpec, about[SPEC], source=str(source)) if SPEC in about else None
    try:
        read = list(dataset.iterate_episodes(chosen))
    except (OSError, KeyError) as error:
        raise DatasetError(
            f"{source}: {len(dataset)} whole episodes required by its metadata, got: {error}. Restore the dataset."
        ) from error
    found = [_steps(episode, source) for episode in read]
    return Trajectories(
        spec=spec or stored or _spec_of(dataset, box),
        **{name: torch.cat([steps[name] for steps in found]) for name in found[0]},
        lengths=torch.tensor([len(steps["rewards"]) for steps in found]),
        provenance=tuple(_provenance_of(dataset, chosen, ours=stored is not None)),
    )


def write_minari(
    trajectories: Trajectories,
    out: str | Path,
    *,
    env_id: str | None = None,
    description: str = "",
) -> Path:
    """Write all episodes as one Minari dataset, which appears whole or not at all. Returns its folder.

    Args:
        trajectories: their spec and provenance are kept; an episode that is not terminated is marked truncated at its last step.
        out: a new folder (`Path`; Minari calls it worldline/<the folder's name>-v0), or an id such as "worldline/hopper-v0" (`str`).
        env_id: the Gymnasium environment that these are episodes of, for Minari's `recover_environment`. None: not known.
        description: for people, in the metadata.

    Raises:
        DatasetError: something is there already; an id that Minari does not allow; an unknown environment; a next observation that
            is not the observation of the step that follows.
    """
    minari = _minari()
    from minari.dataset.minari_storage import MinariStorage

    folder, name = _destination(out)
    if folder.exists():
        raise DatasetError(f"{folder}: a new dataset required, but this exists. Choose another name, or delete it.")
    _require_chains(trajectories)
    action = trajectories.spec.action
    folder.parent.mkdir(parents=True, exist_ok=True)
    # hidden: Minari does not list it; absolute: its get_size does not find files by a relative path
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent.resolve()))
    try:
        whole = staging / folder.name
        whole.mkdir()
        storage = MinariStorage.new(
            whole / "data",
            observation_space=Box(-np.inf, np.inf, (trajectories.observations.shape[1],), np.float32),
            action_space=Box(np.array(action.low, np.float32), np.array(action.high, np.float32), dtype=np.float32),
            env_spec=None if env_id is None else _env_spec(env_id),
        )
        told = {"description": description} if description else {}
        told |= {"dataset_id": name, "minari_version": minari.__version__, SPEC: to_json(trajectories.spec)}
        _write_episodes(whole / "data" / "main_data.hdf5", trajectories)
        counts = {"total_episodes": len(trajectories), "total_steps": trajectories.steps}
        storage.update_metadata({**told, **counts, "dataset_size": storage.get_size()})
        whole.rename(folder)
    finally:
        shutil.rmtree(staging)
    return folder


# --- Reading ----------------------------------------------------------------------------------------------------------


def _folder_of(minari: Any, source: str | Path) -> Path:
    """The folder with metadata.json. Raises `DatasetError` that lists what there is."""
    for folder in (Path(source) / "data", Path(source)):
        if (folder / "metadata.json").is_file():
            return folder
    if isinstance(source, Path) or Path(source).is_dir():
        raise DatasetError(
            f"{source}: a folder with data/main_data.hdf5 and data/metadata.json (a Minari dataset) required, "
            f"got {'another folder' if Path(source).is_dir() else 'nothing there'}."
        )
    from minari.storage.datasets_root_dir import get_dataset_path

    folder = get_dataset_path(source) / "data"
    if (folder / "metadata.json").is_file():
        return folder
    known = sorted(minari.list_local_datasets())
    close = difflib.get_close_matches(source, known, n=5, cutoff=0.5)
    raise DatasetError(
        f"{source!r}: a folder or a Minari dataset on this machine required, {get_dataset_path()} has "
        f"{', '.join(close or known) or 'none'}. `minari download {source}` fetches a published one."
    )


def _vector(space: gymnasium.Space, what: str, source: str | Path) -> Box:
    if isinstance(space, Box) and len(space.shape) == 1:
        return space
    if isinstance(space, Box) and space.dtype == np.uint8:
        way = "Pictures belong in a LeRobot dataset: `worldline record`, or `worldline.data.write_dataset`."
    elif what == "observations":
        way = "Flatten them with gymnasium.wrappers.FlattenObservation and record again."
    else:
        way = "Only continuous actions can be learned here: choose a dataset whose action space is a flat Box."
    raise DatasetError(f"{source}: {what} in a Box of one axis required, got {space}. {way}")


def _steps(episode: Any, source: str | Path) -> dict[str, Tensor]:
    seen, steps = np.asarray(episode.observations), len(episode.rewards)
    if not (len(seen) == steps + 1 and len(episode.actions) == len(episode.terminations) == steps):
        raise DatasetError(
            f"{source}: episode {episode.id}: {steps} rewards call for {steps + 1} observations, {steps} actions and {steps} "
            f"terminations, got {len(seen)}, {len(episode.actions)} and {len(episode.terminations)}."
        )
    chain = torch.from_numpy(seen.astype(np.float32))
    return {
        "observations": chain[:-1],
        "actions": torch.from_numpy(np.asarray(episode.actions).astype(np.float32)),
        "rewards": torch.from_numpy(np.asarray(episode.rewards).astype(np.float32)),
        "next_observations": chain[1:],
        "terminated": torch.from_numpy(np.asarray(episode.terminations).astype(bool)),
    }


def _spec_of(dataset: Any, box: Box) -> WorldSpec:
    environment = dataset.env_spec.id if dataset.env_spec is not None else dataset.id
    return control_spec(
        environment, dataset.observation_space.shape[0], box.low.tolist(), box.high.tolist(), rate_hz=1.0
    )


def _provenance_of(dataset: Any, episodes: list[int], *, ours: bool) -> Iterator[dict[str, str]]:
    """What was stored; of a dataset of others, where each episode is from."""
    for number, about in zip(episodes, dataset.storage.get_episode_metadata(episodes)):
        if PROVENANCE in about:
            yield json.loads(about[PROVENANCE])
        elif not ours:
            yield {"dataset": dataset.id, "episode": str(number)}


# --- Writing ----------------------------------------------------------------------------------------------------------


def _destination(out: str | Path) -> tuple[Path, str]:
    """The folder, and what Minari calls it."""
    if isinstance(out, Path):
        plain = re.sub(r"[^-\w]+", "-", out.name).strip("-") or "trajectories"
        return out, f"worldline/{plain}" + ("" if re.search(r"-v\d+$", plain) else "-v0")
    if not _ID.fullmatch(out):
        raise DatasetError(
            f"a Minari id of the form namespace/name-v0 required, got {out!r}. For a folder give a Path."
        )
    from minari.storage.datasets_root_dir import get_dataset_path

    return get_dataset_path(out), out


def _require_chains(trajectories: Trajectories) -> None:
    broken = (trajectories.next_observations[:-1] != trajectories.observations[1:]).any(1) & ~trajectories.last[:-1]
    if broken.any():
        at = int(broken.nonzero()[0])
        episode = int(trajectories.episode[at])
        raise DatasetError(
            "next observations that are the observation of the following step required (Minari keeps an episode as one chain of "
            f"them), but {int(broken.sum())} of {trajectories.steps} are not, first at step {at - int(trajectories.starts[episode])} "
            f"of episode {episode}. Make each unbroken stretch an episode of its own."
        )


def _write_episodes(file: Path, trajectories: Trajectories) -> None:
    """Minari's HDF5 layout, each table in one piece: Minari's own writer leaves room to grow, 15 kB an episode."""
    import h5py

    numbers = {
        name: getattr(trajectories, name).detach().cpu().numpy().astype(np.float32)
        for name in ("observations", "actions", "rewards", "next_observations")
    }
    ended = trajectories.terminated.cpu().numpy()
    with h5py.File(file, "w", track_order=True) as store:
        for episode, (start, length) in enumerate(zip(trajectories.starts.tolist(), trajectories.lengths.tolist())):
            rows, final = slice(start, start + length), slice(start + length - 1, start + length)
            truncated = np.zeros(length, bool)
            truncated[-1] = not ended[final][0]
            group = store.create_group(f"episode_{episode}")
            group["observations"] = np.concatenate([numbers["observations"][rows], numbers["next_observations"][final]])
            group["actions"], group["rewards"] = numbers["actions"][rows], numbers["rewards"][rows]
            group["terminations"], group["truncations"] = ended[rows], truncated
            group.create_group("infos")
            group.attrs.update({"id": episode, "total_steps": length})
            if trajectories.provenance:
                group.attrs[PROVENANCE] = json.dumps(dict(trajectories.provenance[episode]), sort_keys=True)


def _env_spec(env_id: str) -> Any:
    try:
        return gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        raise DatasetError(
            f"env_id: a registered Gymnasium environment required, got {env_id!r} ({error}). Import the package that "
            "registers it, or leave env_id out."
        ) from error


def _minari() -> Any:
    try:
        import h5py  # noqa: F401  # Minari itself asks for it only when it opens a file
        import minari
    except ImportError as error:
        raise DatasetError(
            f'Minari is required and could not be imported ({error}): pip install "worldline[offline]" brings it.'
        ) from error
    return minari
