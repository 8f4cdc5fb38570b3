"""Names of environments: the house's tasks and Gymnasium's ids name some of the same ones."""

import re

import gymnasium

from worldline.sim.control import CONTROL_TASKS


def differ(one: str, other: str) -> bool:
    """Whether two names are of environments that are not the same. A name that nobody here knows says nothing, and neither does a version:
    "hopper" is "Hopper-v4", "pointmaze/umaze" is not "pointmaze/medium"."""
    known = {_bare(name) for name in (*CONTROL_TASKS, *gymnasium.registry)}
    return _bare(one) != _bare(other) and {_bare(one), _bare(other)} <= known


def _bare(name: str) -> str:
    """Without version, case and punctuation: PointMaze_UMaze-v3 is pointmaze/umaze."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-v\d+$", "", name).lower())
