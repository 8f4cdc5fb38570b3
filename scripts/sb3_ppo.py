"""Stable-Baselines3's PPO, unmodified, trained inside a world model from pictures and pose; needs `pip install "worldline[sb3]"`.

    python scripts/sb3_ppo.py --world-model runs/wm --scorer runs/success --data data/drawer --out runs/sb3_ppo.zip

Imagined episodes begin at first frames of the training episodes of `--data`; the success before and after is counted from
those of the held-out ones. It is imagined: what a simulator would say of the policy is another matter. A policy from nothing
needs many more steps than one that was cloned first, which is what `worldline refine` is for.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor
from tqdm import tqdm

from worldline.commands.sampling import load_dream
from worldline.errors import WorldlineError
from worldline.eval.replays import load_starts
from worldline.rl_in_imagination import ImaginedVectorEnv, SuccessScorer
from worldline.rl_in_imagination.stable_baselines import ImaginedVecEnv


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    world_model: Path
    scorer: Path
    data: tuple[Path, ...]
    """Datasets with the real first frames."""
    out: Path | None = None
    """Where the trained agent is kept, as Stable-Baselines3 saves it."""
    steps: int = 20_000
    """Imagined frames to train for, all rows together; rounded up to whole rollouts."""
    rows: int = 16
    """Episodes imagined side by side."""
    frames: int = 41
    """Of an episode, the real first one included."""
    rollout: int = 32
    """Frames a row between two updates."""
    judged: int = 32
    """Episodes whose success is counted, before and after."""
    seed: int = 0


def main(config: Config) -> None:
    dream, scorer = load_dream(config.world_model), SuccessScorer.from_pretrained(config.scorer)

    def env_of(split: str) -> VecMonitor:
        starts, mode = load_starts(config.data, split, dream).first, AutoresetMode.SAME_STEP
        env = ImaginedVectorEnv(
            dream, scorer, starts, num_envs=config.rows, horizon=config.frames - 1, autoreset_mode=mode
        )
        return VecMonitor(ImaginedVecEnv(env, reward="success"))

    env, held_out = env_of("train"), env_of("held-out")
    agent = PPO("MultiInputPolicy", env, n_steps=config.rollout, batch_size=64, seed=config.seed)

    def success() -> float:
        held_out.seed(config.seed + 1_000_000)
        returns, _ = evaluate_policy(agent, held_out, n_eval_episodes=config.judged, deterministic=False)
        return float(np.mean(returns))  # a success is worth 1, and ends the episode

    before = success()
    whole = config.rows * config.rollout
    with tqdm(total=-(-config.steps // whole) * whole, desc="PPO", unit="frame") as bar:

        def count(*_: object) -> bool:
            bar.update(config.rows)
            return True

        agent.learn(config.steps, callback=count)
    print(
        f"imagined success from held-out starts, {config.judged} episodes: {before:.2f} before, {success():.2f} after"
    )
    if config.out is not None:
        agent.save(config.out)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except WorldlineError as error:
        sys.exit(f"error: {error}")
