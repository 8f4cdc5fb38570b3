"""Recording policies by name: what each family of worlds offers to `record`.

Meta-World's are in `behaviours.py`, the arm's in `arm_behaviours.py`; other worlds know smooth random actions only. A family
that is added needs a line in `policy_names` and one in `scripted_policy`.
"""

from collections.abc import Callable

from worldline.sim.arm_behaviours import BLENDS, CAUSES, arm_behaviour, arm_cause, arm_policies, require_horizon
from worldline.sim.base import Controller, SimulatedWorld, unknown
from worldline.sim.behaviours import POLICIES, behaviour, episode_cause, smooth_random

ScriptedPolicy = Callable[[int, int], tuple[str, Controller]]
"""(index of the episode, seed of its start) to the episode's cause and the controller that acts it out."""

ALL_POLICIES = tuple(dict.fromkeys([*POLICIES, *(name for task in CAUSES for name in (*BLENDS[task], *CAUSES[task]))]))


def policy_names(world: str) -> tuple[str, ...]:
    """The names that `record` takes for `world`, the default first. Raises `SimulatorError` for an unknown arm task."""
    family, _, task = world.partition("/")
    match family:
        case "metaworld":
            return POLICIES
        case "arm":
            return arm_policies(task)
        case _:
            return ("random",)


def scripted_policy(
    name: str, world: str, *, seed: int, made: SimulatedWorld, rehearsal: Callable[[], SimulatedWorld]
) -> ScriptedPolicy:
    """The policy called `name` of the recording `seed` in `world`.

    `made` is the world itself; `rehearsal` gives another, unrendered one of the same kind, which may be reset and played.
    Raises `SimulatorError` if the world has no such policy, or too short a horizon for it.
    """
    known = policy_names(world)
    if name not in known:
        raise unknown("recording policy", name, known)
    family, _, task = world.partition("/")
    horizon, control_steps = made.horizon, made.spec.control_steps

    def metaworld(index: int, start: int) -> tuple[str, Controller]:
        cause = episode_cause(name, seed, index)
        return cause, behaviour(cause, task, seed=start, horizon=horizon, rehearsal=rehearsal())

    def arm(index: int, start: int) -> tuple[str, Controller]:
        cause = arm_cause(task, name, seed, index)
        return cause, arm_behaviour(cause, task, seed=start, horizon=horizon, control_steps=control_steps)

    def other(_index: int, start: int) -> tuple[str, Controller]:
        return "random", smooth_random(made.spec.action, start)

    if family == "arm":
        require_horizon(task, name, horizon=horizon, control_steps=control_steps)
    return {"metaworld": metaworld, "arm": arm}.get(family, other)
