"""Minari in and out: what is written is read back, Minari itself understands it, and what cannot be vectors is refused."""

import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

pytest.importorskip("minari", reason='an extra: pip install "worldline[offline]"')
pytest.importorskip("h5py", reason='an extra: pip install "worldline[offline]"')

import minari
from minari.data_collector import EpisodeBuffer

from worldline.data.minari import read_minari, write_minari
from worldline.data.trajectories import Trajectories, control_spec
from worldline.errors import DatasetError

SPEC = control_spec("point", ("x", "v"), low=(-0.4,), high=(0.4,), rate_hz=20.0)
TABLES = ("observations", "actions", "rewards", "next_observations", "terminated", "lengths")
ENV = "MountainCarContinuous-v0"
VECTOR, FORCE = Box(-np.inf, np.inf, (2,), np.float64), Box(-1, 1, (1,), np.float32)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Minari's storage is a folder of the test's own, and the network is out of reach."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "storage"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield tmp_path / "storage"


def walks(*lengths: int, ends: tuple[bool, ...] = ()) -> Trajectories:
    """Random walks that begin anywhere; those of `ends` terminate."""
    draw = torch.Generator().manual_seed(sum(lengths))
    chains = [torch.randn(n + 1, 2, generator=draw) for n in lengths]
    terminated = torch.zeros(sum(lengths), dtype=torch.bool)
    for at, ended in zip(torch.tensor(lengths).cumsum(0) - 1, ends):
        terminated[at] = ended
    return Trajectories(
        spec=SPEC,
        observations=torch.cat([chain[:-1] for chain in chains]),
        actions=torch.rand(sum(lengths), 1, generator=draw) * 0.8 - 0.4,
        rewards=torch.randn(sum(lengths), generator=draw),
        next_observations=torch.cat([chain[1:] for chain in chains]),
        terminated=terminated,
        lengths=torch.tensor(lengths),
        provenance=tuple({"policy": "walk/é", "score": str(0.1 * e)} for e in range(len(lengths))),
    )


def equal(got: Trajectories, want: Trajectories) -> bool:
    same = all(torch.equal(getattr(got, name), getattr(want, name)) for name in TABLES)
    return same and got.spec == want.spec and got.provenance == want.provenance


def record(name: str, seen: Any, acted: Any, *, observations: Any = VECTOR, actions: Any = FORCE, **more: Any) -> None:
    """A dataset as somebody else would make it, in Minari's storage: one episode of three steps."""
    steps = {"rewards": [0.5, 1.0, 1.5], "terminations": [False] * 3, "truncations": [False, False, True]} | more
    minari.create_dataset_from_buffers(
        name,
        [EpisodeBuffer(observations=seen, actions=acted, infos={"note": [1, 2, 3, 4]}, **steps)],
        env=ENV,
        observation_space=observations,
        action_space=actions,
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    data = walks(4, 1, 7, ends=(True, False, False))
    assert write_minari(data, tmp_path / "runs" / "imagined") == tmp_path / "runs" / "imagined"
    got = read_minari(tmp_path / "runs" / "imagined")
    assert equal(got, data)
    assert got.terminated.nonzero()[:, 0].tolist() == [3], "a truncated end is not a terminated one"
    assert torch.equal(got.next_observations[got.last], data.next_observations[data.last])
    assert equal(read_minari(str(tmp_path / "runs" / "imagined" / "data"), episodes=[2, 0]), data.select([2, 0]))
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["imagined"], "nothing is left beside it"


def test_a_folder_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    walked = walks(5, 4)
    written = write_minari(walked, Path("data/walks"))
    assert equal(read_minari(written), walked) and not written.is_absolute()


def test_without_provenance_and_range(tmp_path: Path) -> None:
    """A task that bounds nothing, of which nothing is known."""
    spec = control_spec("open", 2, low=(-float("inf"),), high=(float("inf"),), rate_hz=1.0)
    data = replace(walks(3, 2), spec=spec, provenance=())
    assert equal(read_minari(write_minari(data, tmp_path / "open")), data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_itself_reads_it_and_recovers_the_environment() -> None:
    data = walks(4, 2, ends=(True, False))
    write_minari(data, "worldline/walks-v0", env_id=ENV, description="two walks")
    assert list(minari.list_local_datasets()) == ["worldline/walks-v0"]
    dataset = minari.load_dataset("worldline/walks-v0")
    assert dataset.total_steps == 6 and dataset.recover_environment().spec == gymnasium.make(ENV).spec
    first, second = dataset[0], dataset[1]
    assert first.terminations.tolist() == [False, False, False, True] and not first.truncations.any()
    assert second.truncations.tolist() == [False, True] and not second.terminations.any()
    assert second.observations.shape == (3, 2) and second.observations.dtype == np.float32
    assert "EpisodeData" in repr(first)
    assert equal(read_minari("worldline/walks-v0"), data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dataset_of_others() -> None:
    seen = np.arange(8.0).reshape(4, 2)
    record("them/car-v3", seen, np.zeros((3, 1)), truncations=[False] * 3)
    got = read_minari("them/car-v3")
    assert got.observations.dtype == torch.float32 and got.next_observations[-1].tolist() == [6.0, 7.0]
    assert got.spec.action.embodiment == ENV and got.spec.action.low == (-1.0,) and got.spec.pose_names == ("o0", "o1")
    assert not got.terminated.any() and got.returns.tolist() == [3.0]
    assert got.provenance == ({"dataset": "them/car-v3", "episode": "0"},)
    assert read_minari("them/car-v3", spec=SPEC).spec == SPEC


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("spaces", "said"),
    [
        (
            {"observations": Dict(state=VECTOR)},
            r"observations in a Box of one axis required, got Dict.*FlattenObservation",
        ),
        ({"observations": Box(-1, 1, (4, 2), np.float32)}, r"got Box.*\(4, 2\).*FlattenObservation"),
        ({"observations": Box(0, 255, (8, 8, 3), np.uint8)}, r"got Box.*\(8, 8, 3\).*LeRobot"),
        ({"actions": Discrete(3)}, r"actions in a Box of one axis required, got Discrete\(3\).*continuous"),
    ],
)
def test_what_is_no_vector_is_refused(spaces: dict[str, gymnasium.Space], said: str) -> None:
    whole: dict[str, Any] = {"observations": VECTOR, "actions": FORCE} | spaces

    def some(space: gymnasium.Space, n: int) -> Any:
        if isinstance(space, Dict):
            return {key: some(part, n) for key, part in space.spaces.items()}
        return np.stack([space.sample() for _ in range(n)])

    record("them/other-v0", some(whole["observations"], 4), some(whole["actions"], 3), **spaces)
    with pytest.raises(DatasetError, match=said):
        read_minari("them/other-v0")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_numbers_that_cannot_be_used_are_refused() -> None:
    seen = np.zeros((4, 2))
    seen[2, 1] = np.nan
    record("them/nan-v0", seen, np.zeros((3, 1)))
    with pytest.raises(DatasetError, match=r"observations: finite numbers required, .* step 2 of episode 0"):
        read_minari("them/nan-v0")
    record("them/far-v0", np.zeros((4, 2)), np.full((3, 1), 3.0))
    with pytest.raises(DatasetError, match=r"actions within \[-1\] .. \[1\] required, got \[3\]"):
        read_minari("them/far-v0")
    record("them/short-v0", np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(DatasetError, match=r"3 rewards call for 4 observations, .* got 3, 3 and 3"):
        read_minari("them/short-v0")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    write_minari(walks(3), "hopper/medium-v0")
    with pytest.raises(DatasetError, match=r"has hopper/medium-v0\. `minari download hopper/medium-v1`"):
        read_minari("hopper/medium-v1")
    with pytest.raises(DatasetError, match=r"data/main_data.hdf5 .* got nothing there"):
        read_minari(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"got another folder"):
        read_minari(tmp_path)
    with pytest.raises(DatasetError, match=r"episodes among 0 .. 0 required, got \[0, 1\]"):
        read_minari("hopper/medium-v0", episodes=[0, 1])
    with pytest.raises(DatasetError, match=r"episodes among 0 .. 0 required, got none"):
        read_minari("hopper/medium-v0", episodes=[])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_minari(walks(3), tmp_path / "d")
    (folder / "data" / "main_data.hdf5").write_bytes(b"half of it")
    with pytest.raises(DatasetError, match=r"d: 1 whole episodes required by its metadata"):
        read_minari(folder)
    (folder / "data" / "metadata.json").write_text("{")
    with pytest.raises(DatasetError, match=r"d: a readable Minari dataset required"):
        read_minari(folder)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    data = walks(3)
    write_minari(data, tmp_path / "d")
    with pytest.raises(DatasetError, match=r"a new dataset required, but this exists"):
        write_minari(walks(5), tmp_path / "d")
    assert equal(read_minari(tmp_path / "d"), data)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("minari.dataset.minari_storage.MinariStorage.get_size", fail)
    with pytest.raises(OSError, match=r"no space left"):
        write_minari(walks(3), tmp_path / "runs" / "d")
    assert not list((tmp_path / "runs").iterdir())


def test_what_minari_cannot_hold_is_refused(tmp_path: Path) -> None:
    data = walks(2, 4)
    torn = data.next_observations.clone()
    torn[3] += 1
    with pytest.raises(DatasetError, match=r"but 1 of 6 are not, first at step 1 of episode 1"):
        write_minari(replace(data, next_observations=torn), tmp_path / "d")
    with pytest.raises(DatasetError, match=r"namespace/name-v0 required, got 'runs/d'.* give a Path"):
        write_minari(data, "runs/d")
    with pytest.raises(DatasetError, match=r"a registered Gymnasium environment required, got 'Walker-v99'"):
        write_minari(data, tmp_path / "d", env_id="Walker-v99")
    assert not (tmp_path / "d").exists()


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(DatasetError, match=r'pip install "worldline\[offline\]"'):
        write_minari(walks(2), tmp_path / "d")
    with pytest.raises(DatasetError, match=r'pip install "worldline\[offline\]"'):
        read_minari("hopper/medium-v0")
