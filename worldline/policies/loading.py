"""A policy from what a user types: a folder, a function or a server, and what is to be done to it behind '@'."""

from typing import Any

from worldline import checkpoint
from worldline.errors import PolicyError
from worldline.policies.cloned import ClonedPolicy
from worldline.policies.states import KIND as STATE_KIND
from worldline.policies.states import StatePolicy
from worldline.policies.steered import KIND, SteeredPolicy
from worldline.policies.video_action import VideoActionPolicy
from worldline.policies.wrappers import CallablePolicy, Corrupted
from worldline.types import Policy, WorldSpec
from worldline.worldmodels import video_action

CORRUPTION = {"noise": float, "lag": int}
UNIFIED = {"steps": int, "execute": int, "warm": float}


def load_policy(name: str, *, spec: WorldSpec, device: str | None = None) -> Policy:
    """A policy from what a user types; one from a checkpoint is put on `device`, by default the GPU if there is one.

    `runs/bc50` a checkpoint folder (or hub name), of a policy or of a unified video-action model · `module:function` a Python callable ·
    `ws://host:port` a policy served from another environment (`@timeout=60`: seconds an answer may take, 10 by default) · any of these with `@noise=0.5,lag=4` behind it, corrupted; a
    video-action model also with `@steps=4,execute=1,warm=0.5`: solver steps, blocks handed out at a time, the level it begins at.

    Args:
        spec: what the world it will act in provides; used by policies that say nothing of what they require.
    """
    base, _, options = name.partition("@")
    if base.startswith(("ws://", "wss://")):
        from worldline.policies.remote import RemotePolicy

        options, limit = _take_timeout(name, options)
        policy: Policy = RemotePolicy(base, spec, timeout=limit)
    elif ":" in base and "/" not in base:
        policy = CallablePolicy.load(base, spec)
    else:
        policy = _trained(base).to(device or checkpoint.best_device())
    return _with_options(policy, name, options) if options else policy


def _trained(name: str) -> VideoActionPolicy | StatePolicy | SteeredPolicy | ClonedPolicy:
    """The policy of a checkpoint folder or hub name."""
    folder = checkpoint.resolve(name)
    config = folder / "config.json"
    if config.is_file() and checkpoint.read_json(config).get("kind") == video_action.KIND:
        return VideoActionPolicy.from_pretrained(folder)
    kind = checkpoint.load_config(folder, part="policy")["kind"]
    if kind.startswith(STATE_KIND):
        return StatePolicy.from_pretrained(folder)
    return (SteeredPolicy if kind == KIND else ClonedPolicy).from_pretrained(folder)


def _take_timeout(name: str, options: str) -> tuple[str, float]:
    """The options behind '@' without `timeout`, and the seconds that it says (10)."""
    items = [item for item in options.split(",") if item]
    told = [item.partition("=")[2] for item in items if item.startswith("timeout=")]
    try:
        limit = float(told[-1]) if told else 10.0
    except ValueError as error:
        raise PolicyError(f"policy {name!r}: timeout=SECONDS required after '@', got {told[-1]!r}") from error
    return ",".join(item for item in items if not item.startswith("timeout=")), limit


def _with_options(policy: Policy, name: str, options: str) -> Policy:
    """The policy with what stands behind '@'. Raises `PolicyError` for options that it does not have."""
    settings = _options(name, options, unified=isinstance(policy, VideoActionPolicy))
    corruption = {k: settings.pop(k) for k in CORRUPTION if k in settings}
    if settings:
        assert isinstance(policy, VideoActionPolicy)
        policy = policy.with_options(**settings)
    return Corrupted(policy, **corruption) if corruption else policy


def _options(name: str, options: str, *, unified: bool) -> dict[str, Any]:
    kinds: dict[str, Any] = {**CORRUPTION, **(UNIFIED if unified else {})}
    required = "noise=NUMBER and lag=STEPS"
    if unified:
        required = "noise=NUMBER, lag=STEPS, steps=N, execute=BLOCKS and warm=LEVEL"
    settings: dict[str, Any] = {}
    for item in options.split(","):
        key, _, value = item.partition("=")
        try:
            settings[key] = kinds[key](value)
        except (KeyError, ValueError) as error:
            raise PolicyError(f"policy {name!r}: {required} required after '@', got {item!r}") from error
    return settings
