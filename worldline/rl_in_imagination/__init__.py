"""Rollouts inside a frozen world model: the dream, its Gymnasium face, and what tells success in it."""

from worldline.rl_in_imagination.dream import Dream, DreamState, Rollouts, rollout
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer
from worldline.rl_in_imagination.vector_env import ImaginedVectorEnv, to_observation
from worldline.rl_in_imagination.vector_env_checker import check_vector_env

__all__ = [
    "Dream",
    "DreamState",
    "ImaginedVectorEnv",
    "Rollouts",
    "SuccessConfig",
    "SuccessScorer",
    "check_vector_env",
    "rollout",
    "to_observation",
]
