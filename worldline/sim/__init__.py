"""Simulators: episodes to learn from, and the ground truth that rankings are checked against.

`make_world` makes a world, `record` fills a dataset from it, `rollout_policy` measures a policy in it. Neither MuJoCo nor
Meta-World is imported before a world that needs it is made.
"""

from worldline.sim.base import SimFrame, SimStep, SimulatedWorld, make_world
from worldline.sim.record import episode_seed, record
from worldline.sim.rollout import (
    RolloutResult,
    StartCheck,
    disjoint_starts,
    rollout_actions,
    rollout_policy,
    start_states,
)
from worldline.sim.workers import WorldPool

__all__ = [
    "RolloutResult",
    "SimFrame",
    "SimStep",
    "SimulatedWorld",
    "StartCheck",
    "WorldPool",
    "disjoint_starts",
    "episode_seed",
    "make_world",
    "record",
    "rollout_actions",
    "rollout_policy",
    "start_states",
]
