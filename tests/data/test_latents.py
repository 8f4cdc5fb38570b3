"""The latent cache: pairs latents with actions at every stride and compression, resumes, refuses other tokenizers."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worldline.data import LatentCache, LeRobotDataset, latents
from worldline.errors import CheckpointError, DatasetError
from worldline.types import LatentSpec


class MeanTokenizer:
    """One latent is the 2x2 mean image of its last frame; r frames a latent, the first latent one frame."""

    def __init__(self, fingerprint: str = "mean-1", r: int = 1) -> None:
        self.latent_spec = LatentSpec(
            fingerprint=fingerprint,
            shapes={"front": (3, 2, 2), "wrist": (3, 2, 2)},
            mean={"front": (0.0,) * 3, "wrist": (0.0,) * 3},
            std={"front": (1.0,) * 3, "wrist": (1.0,) * 3},
            frames_per_latent=r,
        )
        self.calls = 0

    def encode(self, frames: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.calls += 1
        r = self.latent_spec.frames_per_latent
        return {
            c: torch.stack([torch.nn.functional.adaptive_avg_pool2d(row[::r].float(), 2) for row in f])
            for c, f in frames.items()
        }

    def decode(self, latents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise NotImplementedError


def shown(made: Tensor) -> list[int]:
    return [round((float(latent.mean()) - 22) / 5) for latent in made]


@pytest.mark.parametrize(("stride", "r"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_latents_poses_and_blocks_are_paired(recorded: Path, tmp_path: Path, stride: int, r: int) -> None:
    cache = LatentCache.build(
        tmp_path / "c", LeRobotDataset(recorded), MeanTokenizer(r=r), stride=stride, progress=False
    )
    assert cache.spec.control_steps == 3 * stride and cache.spec.latent is not None
    for phase in range(stride):
        clip = cache.episode(0, phase)
        numbers = shown(clip.frames["front"][0])
        assert numbers == list(range(phase, 12, stride * r)) == clip.poses[0, :, 0].int().tolist()
        assert clip.actions.shape == (1, len(numbers) - 1, 3 * stride * r, 2)
        assert torch.allclose(clip.actions[0, :, 0, 0] * 50, torch.tensor(numbers[:-1]).float(), atol=1e-4)
    batch = cache.batch(0, 3, 6, 2)
    assert [shown(row) for row in batch.frames["wrist"]] == batch.poses[:, :, 0].int().tolist()
    assert torch.equal(batch.poses, LatentCache.open(tmp_path / "c", "mean-1").batch(0, 3, 6, 2).poses)
    assert not torch.equal(batch.poses, cache.batch(1, 3, 6, 2).poses)


def test_pieces_equal_whole_episodes_and_half_is_close(recorded: Path, tmp_path: Path) -> None:
    dataset = LeRobotDataset(recorded)
    whole = LatentCache.build(tmp_path / "a", dataset, MeanTokenizer(), progress=False, batch_frames=100)
    pieces = LatentCache.build(tmp_path / "b", dataset, MeanTokenizer(), progress=False, batch_frames=5)
    half = LatentCache.build(tmp_path / "h", dataset, MeanTokenizer(), progress=False, half=True)
    assert torch.equal(whole.episode(0).frames["front"], pieces.episode(0).frames["front"])
    assert half.episode(0).frames["front"].dtype == torch.float32
    assert torch.allclose(whole.episode(0).frames["front"], half.episode(0).frames["front"], rtol=1e-3)


def test_building_resumes_and_extends(recorded: Path, tmp_path: Path) -> None:
    dataset = LeRobotDataset(recorded)
    LatentCache.build(tmp_path / "c", dataset, MeanTokenizer(), episodes=[0, 2], progress=False)
    (tmp_path / "c/episode-000002.safetensors").unlink()
    second = MeanTokenizer()
    cache = LatentCache.build(tmp_path / "c", dataset, second, episodes=[0, 1, 2], progress=False)
    assert cache.episodes == [0, 1, 2] and second.calls == 2


def test_an_index_that_was_lost_is_made_from_the_files(recorded: Path, tmp_path: Path) -> None:
    dataset, again = LeRobotDataset(recorded), MeanTokenizer()
    first = LatentCache.build(tmp_path / "c", dataset, MeanTokenizer(), progress=False)
    index = (tmp_path / "c/cache.json").read_text()
    (tmp_path / "c/cache.json").unlink()
    cache = LatentCache.build(tmp_path / "c", dataset, again, progress=False)
    assert again.calls == 0 and (tmp_path / "c/cache.json").read_text() == index
    assert torch.equal(cache.batch(0, 0, 4, 3).poses, first.batch(0, 0, 4, 3).poses)
    # files of another tokenizer are not taken for this one's
    (tmp_path / "c/cache.json").unlink()
    other = MeanTokenizer("mean-2")
    LatentCache.build(tmp_path / "c", dataset, other, progress=False)
    assert other.calls > 0


def test_processes_share_what_is_to_be_encoded(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, in step: each encodes its share, and both know all episodes in the end."""
    encoded: dict[int, list[int]] = {0: [], 1: []}
    together = threading.Barrier(2, timeout=60)
    write = latents.write_tensors

    def in_step(path: Path, *arguments: Any, **options: Any) -> None:
        encoded[int(threading.current_thread().name)].append(int(path.stem.removeprefix("episode-")))
        write(path, *arguments, **options)
        together.wait()

    monkeypatch.setattr(latents, "write_tensors", in_step)
    caches: dict[int, LatentCache] = {}

    def build(rank: int) -> None:
        options = {"episodes": [0, 2], "process": (rank, 2), "progress": False}
        caches[rank] = LatentCache.build(tmp_path / "c", LeRobotDataset(recorded), MeanTokenizer(), **options)

    threads = [threading.Thread(target=build, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caches[0].episodes == caches[1].episodes == [0, 2]
    assert encoded == {0: [0], 1: [2]}
    assert torch.equal(caches[0].batch(0, 0, 4, 3).poses, caches[1].batch(0, 0, 4, 3).poses)


def test_another_tokenizer_dataset_or_stride_is_refused(recorded: Path, tmp_path: Path) -> None:
    dataset = LeRobotDataset(recorded)
    LatentCache.build(tmp_path / "c", dataset, MeanTokenizer(), episodes=[0], progress=False)
    with pytest.raises(CheckpointError, match="tokenizer fingerprint mean-2 required, got mean-1"):
        LatentCache.open(tmp_path / "c", "mean-2")
    with pytest.raises(CheckpointError, match="dataset fingerprint other required"):
        LatentCache.open(tmp_path / "c", "mean-1", dataset_fingerprint="other")
    with pytest.raises(CheckpointError, match="tokenizer fingerprint mean-2 required"):
        LatentCache.build(tmp_path / "c", dataset, MeanTokenizer("mean-2"), progress=False)
    with pytest.raises(CheckpointError, match="stride 2 required, got 1"):
        LatentCache.build(tmp_path / "c", dataset, MeanTokenizer(), stride=2, progress=False)
    with pytest.raises(CheckpointError, match="no such file"):
        LatentCache.open(tmp_path / "nothing", "mean-1")


def test_a_share_of_windows_begins_where_the_sequence_does(recorded: Path, tmp_path: Path) -> None:
    cache = LatentCache.build(tmp_path / "c", LeRobotDataset(recorded), MeanTokenizer(), progress=False)
    first = {tuple(cache.episode(i).poses[0, 0].tolist()) for i in cache.episodes}

    def at_start(starts: float) -> float:
        poses = torch.cat([cache.batch(0, step, 8, 2, starts=starts).poses[:, 0] for step in range(40)])
        return sum(tuple(pose.tolist()) in first for pose in poses) / len(poses)

    windows = at_start(0.0)
    assert at_start(1.0) == 1.0 and windows < 0.6
    assert abs(at_start(0.5) - (0.5 + 0.5 * windows)) < 0.1


def test_draws_can_be_limited_to_a_split(recorded: Path, tmp_path: Path) -> None:
    cache = LatentCache.build(tmp_path / "c", LeRobotDataset(recorded), MeanTokenizer(), progress=False)
    assert set(cache.batch(0, 0, 16, 4, episodes=[1, 3]).poses[:, 0, 1].tolist()) == {1.0, 3.0}
    with pytest.raises(DatasetError, match="at least 6 latents required, the longest of 1 has 5"):
        cache.batch(0, 0, 4, 6, episodes=[3])


def test_windows_with_what_came_before_them(recorded: Path, tmp_path: Path) -> None:
    cache = LatentCache.build(tmp_path / "c", LeRobotDataset(recorded), MeanTokenizer(), progress=False)
    plain, whole, capped = (cache.batch(0, 3, 6, 4, starts=0.3, lead=lead) for lead in (0, 100, 2))
    assert plain.led is None and plain.lead == 0
    assert whole.led is not None and capped.led is not None
    assert whole.lead == int(whole.led.max()) > 2 and capped.lead == 2 and int(whole.led.min()) == 0
    for clip in (whole, capped):
        assert clip.led is not None
        assert torch.equal(clip.frames["wrist"][:, clip.lead :], plain.frames["wrist"])
        assert torch.equal(clip.actions[:, clip.lead :], plain.actions)
        for row, before in enumerate(clip.led.tolist()):
            numbers = clip.poses[row, clip.lead - before :, 0].int().tolist()
            assert numbers == list(range(numbers[0], numbers[0] + before + 4))  # one run of frames, none left out
            assert not clip.poses[row, : clip.lead - before].any()
    assert (whole.poses[:, whole.lead, 0] == whole.led).all()  # all there is, back to the episode's first frame
