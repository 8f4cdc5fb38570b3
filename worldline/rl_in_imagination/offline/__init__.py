"""Offline RL on low-dimensional transitions, real and synthetic: agents of several seeds at once, their data and their training."""

from worldline.rl_in_imagination.offline.agents import (
    TD3BC,
    AgentConfig,
    OfflineAgent,
    StateIQL,
    StateIQLConfig,
    TD3BCConfig,
    build_agent,
    reach_aware,
)
from worldline.rl_in_imagination.offline.critics import Critics
from worldline.rl_in_imagination.offline.reach import likeness, pessimistic
from worldline.rl_in_imagination.offline.replay import (
    Batch,
    Replay,
    Scaling,
    SyntheticTables,
    episode_weights,
    fit_scaling,
)
from worldline.rl_in_imagination.offline.run import OfflineConfig, OfflineRun, train_offline

__all__ = [
    "TD3BC",
    "AgentConfig",
    "Batch",
    "Critics",
    "OfflineAgent",
    "OfflineConfig",
    "OfflineRun",
    "Replay",
    "Scaling",
    "StateIQL",
    "StateIQLConfig",
    "SyntheticTables",
    "TD3BCConfig",
    "build_agent",
    "episode_weights",
    "fit_scaling",
    "likeness",
    "pessimistic",
    "reach_aware",
    "train_offline",
]
