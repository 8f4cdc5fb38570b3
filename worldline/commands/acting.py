"""Policies as verbs take them: those of `load_policy`, and the same planning in a dream."""

from pathlib import Path
from typing import Any

from worldline.commands.sampling import load_dream, load_scorer
from worldline.errors import PolicyError
from worldline.policies import Corrupted, VideoActionPolicy, load_policy
from worldline.rl_in_imagination.planning import BestOfN
from worldline.types import Policy, WorldSpec

PLANNING: dict[str, Any] = {"best": int, "beyond": int, "spread": float, "scorer": str, "dream": str}


def load_acting(name: str, *, spec: WorldSpec, device: str | None = None) -> Policy:
    """As `load_policy`; with `@best=8,scorer=runs/success,dream=runs/wm` behind it each chunk is the best of 8 tried in that dream.

    `beyond=8` judges 8 frames after the chunk, `spread=0.3` tries it with noise (`BestOfN`). A unified model plans in its own dream if none is
    named. Raises `PolicyError` for options that are missing, or that do not go together.
    """
    plain, planning = _parted(name)
    policy = load_policy(plain, spec=spec, device=device)
    if not planning:
        return policy
    if isinstance(policy, Corrupted):
        raise PolicyError(
            f"policy {name!r}: a policy that is corrupted (noise, lag) cannot plan, leave one of the two out"
        )
    own = plain.partition("@")[0] if isinstance(policy, VideoActionPolicy) else None
    scorer, dream = planning.pop("scorer", None), planning.pop("dream", own)
    candidates = planning.pop("best", None)
    if candidates is None or scorer is None or dream is None:
        raise PolicyError(
            f"policy {name!r}: a policy that plans requires best=N, scorer=FOLDER and dream=FOLDER (a world model) after '@'; a unified "
            "model may leave dream out"
        )
    judge = load_scorer(scorer, device=device)
    return BestOfN(policy, load_dream(Path(dream)), judge, candidates=candidates, **planning)


def planning_folders(name: str) -> list[str]:
    """Scorer and dream of a policy that plans, the dream its own where none is named: what it does depends on them too."""
    planning = _parted(name)[1]
    return [planning.get("scorer", ""), planning.get("dream", name.partition("@")[0])] if "best" in planning else []


def _parted(name: str) -> tuple[str, dict[str, Any]]:
    """The name without the options of planning, and those."""
    base, _, options = name.partition("@")
    rest, planning = [], {}
    for item in options.split(",") if options else ():
        key, _, value = item.partition("=")
        if key not in PLANNING:
            rest.append(item)
            continue
        try:
            planning[key] = PLANNING[key](value)
        except ValueError as error:
            raise PolicyError(f"policy {name!r}: a number required for {key} after '@', got {item!r}") from error
    return (f"{base}@{','.join(rest)}" if rest else base), planning
