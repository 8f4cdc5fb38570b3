"""Draw a small dataset in the shape of DROID: three cameras, 15 Hz, AV1, joint and Cartesian columns, instructions.

    python scripts/make_droid_like.py OUT --episodes 4 --version v3.0

A two-link arm moves a gripper over a table with two blocks. Two fixed cameras look at the table from different sides; the
wrist camera travels with the gripper, so what it sees depends on the actions. The arm reaches its commanded pose with a
lag, as real arms do. Everything is random but a function of the seed. Nothing in it comes from the DROID dataset.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image, ImageDraw

from worldline.data.lerobot_assemble import (
    IMAGES,
    INDEX_FEATURES,
    RawEpisode,
    assemble,
    index_columns,
    numeric_table,
    vector_feature,
    video_feature,
)
from worldline.data.statistics import column_stats, image_histogram, image_stats, to_lists
from worldline.data.video import encode_video
from worldline.errors import DatasetError, WorldlineError
from worldline.types import CameraSpec

CAMERAS = ("exterior_1_left", "exterior_2_left", "wrist_left")
FPS = 15.0
FOLLOW = 0.45  # share of the way to the commanded pose that the arm covers in a frame
JOINTS = [f"joint_{i}" for i in range(7)]
AXES = ["x", "y", "z", "roll", "pitch", "yaw"]
COLORS = {"red": (205, 60, 50), "blue": (50, 90, 200)}
FEATURES = {
    "observation.state.joint_position": vector_feature(JOINTS),
    "observation.state.cartesian_position": vector_feature(AXES),
    "observation.state.gripper_position": vector_feature(["gripper"]),
    "observation.state": vector_feature([*JOINTS, "gripper"]),
    "action.joint_velocity": vector_feature(JOINTS),
    "action.cartesian_position": vector_feature(AXES),
    "action.gripper_position": vector_feature(["gripper"]),
    "action": vector_feature([*JOINTS, "gripper"]),
}


@dataclass(frozen=True)
class Config:
    """Where and what to draw."""

    out: Annotated[Path, tyro.conf.Positional]
    episodes: int = 4
    frames: int = 40  # about this many frames an episode
    version: Literal["v2.1", "v3.0"] = "v3.0"
    size: str = "180x320"
    seed: int = 0
    crf: int = 24


@dataclass(frozen=True)
class Motion:
    """One episode: what was commanded, where the arm was, where the blocks were."""

    command: np.ndarray  # (t, 7): Cartesian pose and gripper, the target sent after each frame
    pose: np.ndarray  # (t, 7)
    blocks: np.ndarray  # (t, 2, 2): x, y of the red and the blue block
    instruction: str


def simulate(seed: int, frames: int) -> Motion:
    """Reach for a block, close the gripper, carry the block to another place."""
    rng = np.random.default_rng(seed)
    color = str(rng.choice(list(COLORS)))
    which = list(COLORS).index(color)
    block = rng.uniform([0.3, -0.3], [0.7, 0.3], size=(2, 2))
    goal = rng.uniform([0.3, -0.3], [0.7, 0.3])
    pose = np.array([rng.uniform(0.3, 0.7), rng.uniform(-0.3, 0.3), 0.3, 3.1, 0.0, rng.uniform(-0.5, 0.5), 0.0])
    command, poses, blocks = [], [], []
    grasped = False
    for frame in range(frames):
        poses.append(pose.copy())
        blocks.append(block.copy())
        phase = frame / frames
        aim = np.append(block[which], 0.05) if phase < 0.45 else np.append(goal, 0.2)
        wanted = np.concatenate([aim, pose[3:6] + rng.normal(0, 0.02, 3), [float(0.4 < phase < 0.9)]])
        limit = np.array([0.05] * 3 + [0.1] * 3 + [0.5])
        target = pose + np.clip(wanted - pose, -limit, limit) + rng.normal(0, 0.004, 7) * (limit < 0.2)
        target[6] = np.clip(target[6], 0, 1)
        command.append(target)
        pose = pose + FOLLOW * (target - pose)
        near = np.hypot(*(pose[:2] - block[which])) < 0.06
        grasped = pose[6] > 0.3 and (grasped or near)
        if grasped:
            block[which] = pose[:2]
    return Motion(
        command=np.stack(command),
        pose=np.stack(poses),
        blocks=np.stack(blocks),
        instruction=f"pick up the {color} block and move it",
    )


def joints(pose: np.ndarray) -> np.ndarray:
    """Seven smooth functions of the pose that stand in for inverse kinematics: (t, 7)."""
    mix = np.random.default_rng(7).normal(0, 1, (7, 6))
    return np.tanh(pose[:, :6] @ mix.T)


def draw(motion: Motion, camera: str, height: int, width: int) -> np.ndarray:
    """Frames (t, h, w, 3) of one camera."""
    return np.stack([_draw_frame(motion, i, camera, height, width) for i in range(len(motion.pose))])


def _draw_frame(motion: Motion, i: int, camera: str, height: int, width: int) -> np.ndarray:
    pose = motion.pose[i]
    zoom = 2.5 if camera == "wrist_left" else 1.0

    def place(x: float, y: float, z: float = 0.0) -> tuple[float, float]:
        """Table coordinates (metres) to pixels."""
        if camera == "wrist_left":
            turn = pose[5]
            dx, dy = x - pose[0], y - pose[1]
            u, v = np.cos(turn) * dy - np.sin(turn) * dx, np.sin(turn) * dy + np.cos(turn) * dx
            scale = zoom / (0.7 + pose[2])
            return width / 2 + u * scale * height, height * 0.6 - v * scale * height
        side = 1 if camera == "exterior_1_left" else -1
        depth = 0.6 + 0.5 * x
        return width / 2 + side * y * width * 0.9 * depth, height * (0.25 + 0.75 * x - 0.6 * z)

    image = Image.new("RGB", (width, height), (168, 160, 150))
    pen = ImageDraw.Draw(image)
    pen.polygon([place(0.1, -0.5), place(0.1, 0.5), place(0.95, 0.5), place(0.95, -0.5)], fill=(120, 95, 70))
    for x in np.linspace(0.15, 0.95, 9):
        pen.line([place(x, -0.5), place(x, 0.5)], fill=(105, 82, 60))
    for block, color in zip(motion.blocks[i], COLORS.values(), strict=True):
        half = 0.04
        corners = [(-half, -half), (-half, half), (half, half), (half, -half)]
        pen.polygon([place(block[0] + a, block[1] + b) for a, b in corners], fill=color)
    gap = 0.05 * (1 - 0.7 * pose[6])
    if camera == "wrist_left":
        for side in (-1, 1):  # the fingers are always in view and close with the gripper
            middle = width / 2 + side * gap * height * zoom
            pen.rectangle([middle - 6, height * 0.7, middle + 6, height], fill=(40, 40, 45))
    else:
        hand, elbow = place(*pose[:3]), place(pose[0] / 2, pose[1] * 0.8, pose[2] + 0.3)
        pen.line([place(0.0, 0.0, 0.1), elbow, hand], fill=(225, 225, 228), width=max(height // 18, 2), joint="curve")
        for side in (-1, 1):
            tip = place(pose[0], pose[1] + side * gap, pose[2] - 0.05)
            pen.line([hand, tip], fill=(40, 40, 45), width=max(height // 45, 1))
    return np.asarray(image)


def record(config: Config, number: int, cameras: list[CameraSpec], folder: Path) -> RawEpisode:
    """Draw and encode episode `number` into `folder`."""
    seed = config.seed * 100_003 + number
    motion = simulate(seed, config.frames + int(np.random.default_rng(seed).integers(-4, 5)))
    position, wanted = joints(motion.pose), joints(motion.command)
    grip, grip_wanted = motion.pose[:, 6:], motion.command[:, 6:]
    columns = {
        "observation.state.joint_position": position,
        "observation.state.cartesian_position": motion.pose[:, :6],
        "observation.state.gripper_position": grip,
        "observation.state": np.hstack([position, grip]),
        "action.joint_velocity": (wanted - position) * FPS,
        "action.cartesian_position": motion.command[:, :6],
        "action.gripper_position": grip_wanted,
        "action": np.hstack([wanted, grip_wanted]),
    }
    videos, histograms = {}, {}
    for camera in cameras:
        frames = torch.from_numpy(draw(motion, camera.name, camera.height, camera.width)).permute(0, 3, 1, 2)
        path = folder / f"{number:06d}_{camera.name}.mp4"
        encode_video(path, frames, fps=FPS, crf=config.crf)
        videos[IMAGES + camera.name], histograms[IMAGES + camera.name] = path, image_histogram(frames)
    return RawEpisode(
        length=len(motion.pose), task=motion.instruction, columns=columns, videos=videos, histograms=histograms
    )


def write_v21(root: Path, episodes: list[RawEpisode], features: dict) -> None:
    """The older layout: one parquet file and one video per camera for every episode."""
    features = {**features, **INDEX_FEATURES}
    tasks = {task: i for i, task in enumerate(dict.fromkeys(episode.task for episode in episodes))}
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    lines: dict[str, list[dict]] = {"episodes": [], "episodes_stats": [], "tasks": []}
    first = 0
    for number, episode in enumerate(episodes):
        columns = {**episode.columns, **index_columns(number, first, episode.length, FPS, tasks[episode.task])}
        table = numeric_table(columns, features, episode.length)
        pq.write_table(table, root / f"data/chunk-000/episode_{number:06d}.parquet")
        for key, source in episode.videos.items():
            target = root / f"videos/chunk-000/{key}/episode_{number:06d}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
        stats = {k: column_stats(v.reshape(len(v), -1).astype(float)) for k, v in columns.items() if v is not None}
        stats |= {key: image_stats(histogram) for key, histogram in episode.histograms.items()}
        lines["episodes"].append({"episode_index": number, "tasks": [episode.task], "length": episode.length})
        lines["episodes_stats"].append({"episode_index": number, "stats": to_lists(stats)})
        first += episode.length
    lines["tasks"] = [{"task_index": i, "task": task} for task, i in tasks.items()]
    for name, rows in lines.items():
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {
        "codebase_version": "v2.1",
        "robot_type": "droid-like",
        "total_episodes": len(episodes),
        "total_frames": first,
        "total_tasks": len(tasks),
        "total_videos": sum(len(episode.videos) for episode in episodes),
        "total_chunks": 1,
        "chunks_size": 1000,
        "fps": int(FPS),
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=4) + "\n")


def main(config: Config) -> Path:
    """Draw the dataset `config` describes. Raises `DatasetError` if the folder is in use."""
    if config.out.exists() and any(config.out.iterdir()):
        raise DatasetError(f"{config.out}: an empty or new folder required. Choose another.")
    if config.version == "v2.1" and config.episodes > 1000:
        raise DatasetError(f"at most 1000 episodes in v2.1 required, got {config.episodes}. Use --version v3.0.")
    height, width = (int(part) for part in config.size.split("x"))
    cameras = [CameraSpec(name=name, height=height, width=width) for name in CAMERAS]
    features = {IMAGES + c.name: video_feature(c, fps=FPS, codec="av1") for c in cameras} | FEATURES
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".drawing-") as folder:
        episodes = [record(config, number, cameras, Path(folder)) for number in range(config.episodes)]
        if config.version == "v2.1":
            write_v21(config.out, episodes, features)
        else:
            (config.out / "meta").mkdir()
            assemble(config.out, episodes, features, fps=FPS, robot_type="droid-like")
    return config.out


if __name__ == "__main__":
    try:
        print(main(tyro.cli(Config, description=__doc__)))
    except WorldlineError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
