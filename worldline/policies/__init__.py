"""Policies from pixels and poses, alike in simulator and dream."""

from typing import Any

from worldline import checkpoint
from worldline.errors import PolicyError
from worldline.policies.cloned import ClonedPolicy, PolicyConfig
from worldline.policies.encoder import EncoderConfig, ObservationEncoder
from worldline.policies.heads import draw
from worldline.policies.steered import KIND, SteeredPolicy
from worldline.policies.wrappers import CallablePolicy, Corrupted, ThroughTokenizer, Wandering
from worldline.types import Policy, WorldSpec

__all__ = [
    "CallablePolicy",
    "ClonedPolicy",
    "Corrupted",
    "EncoderConfig",
    "ObservationEncoder",
    "PolicyConfig",
    "SteeredPolicy",
    "ThroughTokenizer",
    "Wandering",
    "draw",
    "load_policy",
]


def load_policy(name: str, *, spec: WorldSpec) -> Policy:
    """A policy from what a user types.

    `runs/bc50` a checkpoint folder (or hub name) · `module:function` a Python callable · `ws://host:port` a policy served
    from another environment · any of these with `@noise=0.5,lag=4` behind it, corrupted.

    Args:
        spec: what the world it will act in provides; used by policies that say nothing of what they require.
    """
    base, _, options = name.partition("@")
    if base.startswith(("ws://", "wss://")):
        from worldline.policies.remote import RemotePolicy

        policy: Policy = RemotePolicy(base, spec)
    elif ":" in base and "/" not in base:
        policy = CallablePolicy.load(base, spec)
    else:
        folder = checkpoint.resolve(base)
        steered = checkpoint.load_config(folder, part="policy")["kind"] == KIND
        policy = (SteeredPolicy if steered else ClonedPolicy).from_pretrained(folder)
    return Corrupted(policy, **_corruption(name, options)) if options else policy


def _corruption(name: str, options: str) -> dict[str, Any]:
    kinds = {"noise": float, "lag": int}
    settings: dict[str, Any] = {}
    for item in options.split(","):
        key, _, value = item.partition("=")
        try:
            settings[key] = kinds[key](value)
        except (KeyError, ValueError) as error:
            raise PolicyError(
                f"policy {name!r}: noise=NUMBER and lag=STEPS required after '@', got {item!r}"
            ) from error
    return settings
