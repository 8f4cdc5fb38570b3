"""Record episodes one at a time, from several processes, then file them as a LeRobotDataset v3.0.

Staging makes recording restartable: each episode is encoded into its own folder under `root/.staging`, which appears
whole or not at all. `finish` assembles all of them beside, renames the result into place (`meta/` last: a folder without
`meta/info.json` is unfinished) and removes the staging.

One row is one frame; a row's action is the block that leaves its frame, flattened to k*a numbers. The last frame has no
action: its row holds zeros and `action_is_pad` is true. All numbers are stored as float32.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from av.error import FFmpegError
from torch import Tensor

import worldline
from worldline.checkpoint import read_json, read_tensors, to_json, write_json, write_tensors
from worldline.data.lerobot_assemble import (
    DATA_MB,
    IMAGES,
    VIDEO_MB,
    Feature,
    RawEpisode,
    assemble,
    vector_feature,
    video_feature,
)
from worldline.data.lerobot_read import LeRobotDataset
from worldline.data.splits import held_out_episodes
from worldline.data.statistics import image_histogram
from worldline.data.video import CODEC_NAMES, encode_video
from worldline.errors import DatasetError
from worldline.types import Episode, WorldSpec

log = logging.getLogger(__name__)
STAGING = ".staging"
EXTRA_TYPES = {
    "success": pa.bool_(),
    "terminated": pa.bool_(),
    "truncated": pa.bool_(),
    "initial_success": pa.bool_(),
    "provenance": pa.string(),
}


class DatasetWriter:
    """Stages episodes under `root` and files them as one dataset.

    Instances hold only plain values, so that they can be sent to worker processes. `resume=True` accepts a folder whose
    recording was interrupted; `codec` is any H.264 or AV1 encoder of FFmpeg ("libsvtav1", "libx264"); `data_mb` and
    `video_mb` limit the size of one file. `held_out`: numbers of the episodes that are not trained on; by default a seventh, chosen by a hash
    of `split_seed` and number. `range_observed`: the spec's range of actions is what was seen, not what may be. Raises `DatasetError` if `root` holds anything that is not this writer's own staging.
    """

    def __init__(
        self,
        root: str | Path,
        spec: WorldSpec,
        *,
        crf: int = 18,
        codec: str = "libsvtav1",
        gop: int = 2,
        resume: bool = False,
        split_seed: int = 0,
        held_out: Iterable[int] | None = None,
        range_observed: bool = False,
        data_mb: int | float = DATA_MB,
        video_mb: int | float = VIDEO_MB,
    ) -> None:
        self.root = Path(root)
        self.spec = spec
        self.crf, self.codec, self.gop, self.split_seed = crf, codec, gop, split_seed
        self.held_out = None if held_out is None else sorted(set(held_out))
        self.range_observed = range_observed
        self.data_mb, self.video_mb = data_mb, video_mb
        self.staging = self.root / STAGING
        if bad := [c.name for c in spec.cameras if "/" in c.name or not c.name]:
            raise DatasetError(f"camera names without '/' required, got {bad}. Rename these cameras.")
        self._claim(resume)

    def _claim(self, resume: bool) -> None:
        if (self.root / "meta/info.json").exists():
            raise DatasetError(f"{self.root}: already holds a finished dataset. Choose another output folder.")
        settings = {"spec": to_json(self.spec), "codec": self.codec, "crf": self.crf, "gop": self.gop}
        settings |= {"held_out": self.held_out, "split_seed": self.split_seed}
        if self.staging.is_dir():
            if not resume:
                raise DatasetError(
                    f"{self.root}: holds an interrupted recording of {len(self.staged())} episodes. "
                    "Resume it (resume=True), or delete the folder."
                )
            got = read_json(self.staging / "settings.json")
            if different := [name for name in settings if settings[name] != got.get(name)]:
                raise DatasetError(
                    f"{self.root}: the interrupted recording has another {', '.join(different)}. "
                    "Record with the same settings, or choose another output folder."
                )
            return
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise DatasetError(
                f"{self.root}: an empty or new folder required, it holds something else. Choose another."
            )
        write_json(self.staging / "settings.json", settings)

    def staged(self) -> set[int]:
        """Numbers of the episodes that are staged whole."""
        return {int(path.name.removeprefix("episode-")) for path in self.staging.glob("episode-*")}

    def stage_episode(self, index: int, episode: Episode) -> None:
        """`stage` of all that an episode holds."""
        self.stage(
            index,
            frames=episode.frames,
            actions=episode.actions,
            poses=episode.poses,
            states=episode.states,
            rewards=episode.rewards,
            frame_success=episode.frame_success,
            success=episode.success,
            terminated=episode.terminated,
            truncated=episode.truncated,
            instruction=episode.instruction,
            provenance=episode.provenance,
        )

    def stage(
        self,
        index: int,
        *,
        frames: Mapping[str, Any],
        actions: Any,
        poses: Any,
        states: Any = None,
        rewards: Any = None,
        frame_success: Any = None,
        success: bool | None = None,
        terminated: bool = False,
        truncated: bool = True,
        instruction: str = "",
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        """Encode and write one episode of t >= 2 frames. Safe to call from several processes at once.

        `frames` (camera -> uint8 "t c h w", or none at all), `actions` (t-1, k, a), `poses` (t, p), `states` (t, s),
        `rewards` (t-1) and `frame_success` (t) are arrays or tensors; None means not measured. Raises `DatasetError`
        naming episode and column for wrong shapes, cameras or NaN.
        """
        length = len(poses)
        numbers = {
            "actions": _number(actions),
            "poses": _number(poses),
            "states": _number(torch.zeros(length, 0) if states is None else states),
        }
        if rewards is not None:
            numbers["rewards"] = _number(rewards)
        if frame_success is not None:
            numbers["frame_success"] = torch.as_tensor(frame_success).bool()
        images = {camera: torch.as_tensor(value[:]) for camera, value in frames.items()}
        self._check(index, length, numbers, images)
        meta = {
            "length": length,
            "success": None if success is None else bool(success),
            "terminated": bool(terminated),
            "truncated": bool(truncated),
            "instruction": instruction,
            "provenance": {str(key): str(value) for key, value in (provenance or {}).items()},
            "columns": sorted(numbers),
            "state_dim": numbers["states"].shape[1],
        }
        target = self.staging / f"episode-{index:06d}"
        if target.exists():
            raise DatasetError(f"{target}: episode {index} is already staged. Skip the numbers in staged().")
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=self.staging))
        try:
            for camera, image in images.items():
                path = temporary / f"{camera}.mp4"
                encode_video(path, image, fps=self.spec.fps, codec=self.codec, crf=self.crf, gop=self.gop)
                numbers[f"histogram/{camera}"] = torch.from_numpy(image_histogram(image))
            write_tensors(temporary / "numbers.safetensors", numbers)
            write_json(temporary / "episode.json", meta)
            os.rename(temporary, target)
        except OSError as error:
            raise DatasetError(f"{target}: could not be written ({error}). Free space, then resume.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _check(self, index: int, length: int, numbers: Mapping[str, Tensor], images: Mapping[str, Tensor]) -> None:
        spec = self.spec
        shapes = {
            "actions": (length - 1, spec.control_steps, spec.action.dim),
            "poses": (length, len(spec.pose_names)),
            "states": (length, *numbers["states"].shape[1:2]),
            "rewards": (length - 1,),
            "frame_success": (length,),
        }
        if length < 2:
            raise DatasetError(f"episode {index}: at least 2 frames required, got {length}. Drop the episode.")
        for name, values in numbers.items():
            if tuple(values.shape) != shapes[name]:
                raise DatasetError(
                    f"episode {index}, {name}: shape {shapes[name]} required, got {tuple(values.shape)}."
                )
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                row = int((~torch.isfinite(values)).nonzero()[0, 0])
                raise DatasetError(
                    f"episode {index}, {name}: finite numbers required, got NaN or infinity at frame {row}."
                )
        if images and set(images) != {c.name for c in spec.cameras}:
            raise DatasetError(
                f"episode {index}: cameras {[c.name for c in spec.cameras]} required, got {sorted(images)}."
            )
        if spec.cameras and not images:
            raise DatasetError(
                f"episode {index}: frames of cameras {[c.name for c in spec.cameras]} required, got none."
            )
        for camera, image in images.items():
            want = (length, 3, spec.camera(camera).height, spec.camera(camera).width)
            if tuple(image.shape) != want or image.dtype != torch.uint8:
                raise DatasetError(
                    f"episode {index}, camera {camera}: uint8 {want} required, got {image.dtype} {tuple(image.shape)}."
                )

    def finish(self) -> Path:
        """Assemble all staged episodes into `root` and remove the staging. Returns `root`.

        Raises `DatasetError` if nothing is staged or a number between 0 and the largest is missing. Interrupted, it can
        be called again.
        """
        staged = self.staged()
        if missing := sorted(set(range(max(staged, default=0) + 1)) - staged):
            raise DatasetError(
                f"{self.root}: episodes 0 to {max(staged, default=0)} required, not staged: {missing[:20]}. Stage them."
            )
        metas = {index: read_json(self._folder(index) / "episode.json") for index in sorted(staged)}
        known = {name for meta in metas.values() for name in meta["columns"]}
        if len(dims := {meta["state_dim"] for meta in metas.values()}) > 1:
            raise DatasetError(f"{self.root}: states of one width required, got {sorted(dims)}. Stage them alike.")
        held_out = held_out_episodes(metas, self.split_seed) if self.held_out is None else self.held_out
        if absent := sorted(set(held_out) - set(metas)):
            raise DatasetError(f"{self.root}: held_out of episodes 0 to {len(metas) - 1} required, got {absent[:5]}.")
        assembled = self.staging / "assembled"
        shutil.rmtree(assembled, ignore_errors=True)
        (assembled / "meta").mkdir(parents=True)
        try:
            assemble(
                assembled,
                (self._raw(index, meta) for index, meta in metas.items()),
                self._features(known, metas[0]["state_dim"]),
                fps=self.spec.fps,
                robot_type=self.spec.action.embodiment,
                extra_info={
                    "worldline": {
                        "version": worldline.__version__,
                        "spec": to_json(self.spec),
                        "split_seed": self.split_seed,
                        "held_out": held_out,
                        "range_observed": self.range_observed,
                    }
                },
                extra_types=EXTRA_TYPES,
                data_mb=self.data_mb,
                video_mb=self.video_mb,
            )
            self._publish(assembled)
        except (OSError, FFmpegError) as error:
            raise DatasetError(
                f"{self.root}: could not be assembled ({error}). The staged episodes are kept: "
                "free space, then resume and finish."
            ) from error
        shutil.rmtree(self.staging)
        log.info("%s: %d episodes", self.root, len(metas))
        return self.root

    def _publish(self, assembled: Path) -> None:
        for name in ("data", "videos", "meta"):  # meta last: it makes the folder a dataset
            if (assembled / name).exists():
                shutil.rmtree(self.root / name, ignore_errors=True)  # left by a finish that was interrupted
                os.rename(assembled / name, self.root / name)

    def _folder(self, index: int) -> Path:
        return self.staging / f"episode-{index:06d}"

    def _features(self, known: set[str], state_dim: int) -> dict[str, Feature]:
        spec = self.spec
        codec = CODEC_NAMES.get(self.codec, self.codec)
        flag = {"dtype": "bool", "shape": [1], "names": None}
        features = {IMAGES + c.name: video_feature(c, fps=spec.fps, codec=codec) for c in spec.cameras}
        if spec.pose_names:
            features["observation.state"] = vector_feature(spec.pose_names)
        if state_dim:
            features["observation.environment_state"] = vector_feature([f"state_{i}" for i in range(state_dim)])
        features["action"] = vector_feature(action_column_names(spec))
        features["action_is_pad"] = dict(flag)
        if "rewards" in known:
            features["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
        if "frame_success" in known:
            features["next.success"] = dict(flag)
        features["next.done"] = dict(flag)
        return features

    def _raw(self, index: int, meta: Mapping[str, Any]) -> RawEpisode:
        numbers = {k: v.numpy() for k, v in read_tensors(self._folder(index) / "numbers.safetensors").items()}
        length = meta["length"]
        is_last = np.arange(length) == length - 1
        success, rewards = numbers.get("frame_success"), numbers.get("rewards")
        columns: dict[str, np.ndarray | None] = {
            "observation.state": numbers["poses"],
            "observation.environment_state": numbers["states"],
            "action": np.pad(numbers["actions"].reshape(length - 1, -1), ((0, 1), (0, 0))),
            "action_is_pad": is_last,
            "next.reward": None if rewards is None else np.pad(rewards, (0, 1)),
            "next.success": None if success is None else np.append(success[1:], success[-1]),
            "next.done": np.arange(length) >= length - 2,
        }
        histograms = {c.name: numbers[f"histogram/{c.name}"] for c in self.spec.cameras}
        used = self._features(set(numbers), numbers["states"].shape[1])
        return RawEpisode(
            length=length,
            task=meta["instruction"],
            columns={key: value for key, value in columns.items() if key in used or value is None},
            videos={IMAGES + c.name: self._folder(index) / f"{c.name}.mp4" for c in self.spec.cameras},
            histograms={IMAGES + name: histogram for name, histogram in histograms.items()},
            extras={
                "success": meta["success"],
                "terminated": meta["terminated"],
                "truncated": meta["truncated"],
                "initial_success": None if success is None else bool(success[0]),
                "provenance": json.dumps(meta["provenance"], sort_keys=True),
            },
        )


def action_column_names(spec: WorldSpec) -> list[str]:
    """Names of the k*a numbers of a row's action: plain for k = 1, else "dx@0", "dy@0", ..., "dx@1", ..."""
    if spec.control_steps == 1:
        return list(spec.action.names)
    return [f"{name}@{step}" for step in range(spec.control_steps) for name in spec.action.names]


def write_dataset(
    root: str | Path, episodes: Iterable[Episode], *, like: LeRobotDataset | None = None, **settings: Any
) -> Path:
    """Write `Episode`s (all with the first one's spec) as a dataset. Returns `root`.

    Args:
        like: the dataset whose episodes these are, all of them in its order: the same are held out, and a range of actions that was only
            observed stays known as such.
        settings: `DatasetWriter`'s.
    """
    if like is not None:
        held_out = [number for number, i in enumerate(like.split("all")) if like.held_out(i)]
        kept = {"held_out": held_out, "range_observed": like.range_observed}
        settings = kept | settings
    writer: DatasetWriter | None = None
    for number, episode in enumerate(episodes):
        writer = writer or DatasetWriter(root, episode.spec, **settings)
        if number in writer.staged():
            continue
        writer.stage_episode(number, episode)
    if writer is None:
        raise DatasetError(f"{root}: at least one episode required, got none.")
    return writer.finish()


def _number(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values).float().detach().cpu()
