"""Policies from pixels and poses, or from low-dimensional observations alone, alike in simulator and dream."""

from worldline.policies.batched_mlp import BatchedMLP
from worldline.policies.cloned import ClonedPolicy, PolicyConfig
from worldline.policies.encoder import EncoderConfig, ObservationEncoder
from worldline.policies.heads import draw
from worldline.policies.loading import load_policy
from worldline.policies.states import StatePolicies, StatePolicy, StatePolicyConfig
from worldline.policies.steered import SteeredPolicy
from worldline.policies.video_action import VideoActionPolicy
from worldline.policies.wrappers import CallablePolicy, Corrupted, ThroughTokenizer, Wandering

__all__ = [
    "BatchedMLP",
    "CallablePolicy",
    "ClonedPolicy",
    "Corrupted",
    "EncoderConfig",
    "ObservationEncoder",
    "PolicyConfig",
    "StatePolicies",
    "StatePolicy",
    "StatePolicyConfig",
    "SteeredPolicy",
    "ThroughTokenizer",
    "VideoActionPolicy",
    "Wandering",
    "draw",
    "load_policy",
]
