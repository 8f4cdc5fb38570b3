"""`check_vector_env`: does a `gymnasium.vector.VectorEnv` keep the promises that agents rely on?

Gymnasium checks single environments (`gymnasium.utils.env_checker`), and has no checker for vector ones. Here the episodes
of a row must be a function of its seed and its actions alone. So the same rows are played again: by themselves, in batches
of other rows, and in the other autoreset modes. Modes differ in how the end of an episode is delivered, never in what the
episode was; the last frame as one mode delivers it must be the last frame of every other.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from worldline.errors import WorldlineError

REFUSALS = (ValueError, AssertionError, gymnasium.error.Error)


def check_vector_env(
    make: Callable[[int, AutoresetMode], VectorEnv],
    *,
    rows: int = 3,
    steps: int = 30,
    seed: int = 0,
    modes: Sequence[AutoresetMode] = tuple(AutoresetMode),
    tolerance: float = 0.0,
    bad_actions: bool = True,
) -> None:
    """Play environments with random actions and raise `WorldlineError` at the first promise that is broken.

    Promises: spaces are as declared and hold what is returned; rewards are floats, `terminated` and `truncated` booleans, one
    a row; every key of `infos` has its mask; pictures are uint8; a row's episodes follow from its own seed, whatever the
    other rows do; an int seed s means s, s+1, ...; a reset of some rows leaves the others alone; the last observation is
    delivered in every mode; a row that ended is not stepped in mode DISABLED; what is no action is refused and moves nothing.

    Args:
        make: `make(n, mode)` gives a new environment of n rows in an autoreset mode. It is called about `rows` times a mode.
        rows: n of the batch, at least 2.
        steps: of every play. Each row must end an episode within them, so let `make` give short ones.
        modes: those that `make` can give. A last frame can only be compared if there are two of them.
        tolerance: largest difference accepted between two plays: of floats as they are, of integers as a share of 255. 0 is
            right for exact environments; a network's rounding depends on the batch (1e-2 then).
        bad_actions: whether to send blocks of another shape and NaN. Gymnasium's own vector environments do not refuse them.
    """
    if rows < 2 or steps < 2 or not modes:
        raise ValueError(f"rows and steps of at least 2 and a mode required, got {rows}, {steps} and {modes}")
    seeds = [seed + i for i in range(rows)]
    played: dict[AutoresetMode, list[list[_Episode]]] = {}
    for mode in modes:
        env = make(rows, mode)
        _check_spaces(env, rows, mode)
        batch = played[mode] = _play(env, mode, seeds, steps)
        unended = [row for row, episodes in enumerate(batch) if not episodes[0].ended]
        _require(
            not unended,
            mode,
            f"an episode of every row must end within {steps} steps",
            f"none in rows {unended}",
            "steps",
        )
        _same(
            batch,
            _play(env, mode, seeds, steps),
            tolerance,
            f"{mode.name}: the same seeds again in the same environment",
        )
        observed, _ = env.reset(seed=seed)
        for row, (now, episodes) in enumerate(zip(iterate(env.observation_space, observed), batch)):
            _same_frame(now, episodes[0].frames[0], tolerance, f"{mode.name}: row {row}, reset(seed={seed}), an int")
        observed, _ = _reset(env, [None] * (rows - 1) + [seed])
        now = list(iterate(env.observation_space, observed))[-1]
        _same_frame(now, batch[0][0].frames[0], tolerance, f"{mode.name}: a row alone given its seed, the others None")
        if bad_actions:
            _check_bad_actions(env, mode, seeds, batch, tolerance)
        if mode == AutoresetMode.DISABLED:
            _check_reset_of_a_row(env, seeds)
            _check_ended_rows_wait(env, seeds, steps)
        env.close()
        for row, own in enumerate(seeds):
            alone = make(1, mode)
            _same(
                [batch[row]],
                _play(alone, mode, [own], steps),
                tolerance,
                f"{mode.name}: row {row} alone and in a batch",
            )
            alone.close()
    for mode in modes[1:]:
        _same(played[modes[0]], played[mode], tolerance, f"{modes[0].name} and {mode.name}")


# --- playing ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Episode:
    """What one row lived through: t frames, and of the t-1 steps between them (reward, terminated, truncated)."""

    frames: list[Any]
    steps: list[tuple[float, bool, bool]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.steps) and (self.steps[-1][1] or self.steps[-1][2])


def _play(env: VectorEnv, mode: AutoresetMode, seeds: Sequence[int], steps: int) -> list[list[_Episode]]:
    """The episodes of every row. A row's actions are drawn from its seed, one for each step that counts."""
    n = env.num_envs
    spaces, idle = [_seeded(env, s) for s in seeds], _seeded(env, 0)
    observed, infos = _reset(env, list(seeds))
    _check_returned(env, mode, observed, infos)
    rows = _rows(env, observed)
    episodes = [[_Episode(frames=[row])] for row in rows]
    over = np.zeros(n, bool)
    for _ in range(steps):
        if over.any() and mode == AutoresetMode.DISABLED:
            observed, infos = env.reset(options={"reset_mask": over.copy()})
            _check_returned(env, mode, observed, infos)
            rows = _rows(env, observed)
            for row in np.flatnonzero(over).tolist():
                episodes[row].append(_Episode(frames=[rows[row]]))
            over[:] = False
        skipped = over & (mode == AutoresetMode.NEXT_STEP)
        actions = [(idle if skip else space).sample() for skip, space in zip(skipped, spaces)]
        observed, reward, terminated, truncated, infos = env.step(_batch(env, actions))
        _check_returned(env, mode, observed, infos)
        _check_outcomes(n, mode, reward, terminated, truncated)
        rows, over = _rows(env, observed), terminated | truncated
        if over.any() and mode == AutoresetMode.SAME_STEP:
            mask = np.asarray(infos.get("_final_obs"))
            _require(
                np.array_equal(mask, over), mode, f'infos["_final_obs"] must be True where rows ended, {over}', mask
            )
        for row in range(n):
            if skipped[row]:
                still = not reward[row] and not over[row]
                _require(
                    still, mode, f"row {row}: the step that begins an episode has reward 0 and ends nothing", reward
                )
                episodes[row].append(_Episode(frames=[rows[row]]))
                continue
            final = over[row] and mode == AutoresetMode.SAME_STEP
            last = deepcopy(infos["final_obs"][row]) if final else rows[row]
            episodes[row][-1].frames.append(last)
            episodes[row][-1].steps.append((float(reward[row]), bool(terminated[row]), bool(truncated[row])))
            if final:
                fits = env.single_observation_space.contains(last)
                _require(fits, mode, f'row {row}: infos["final_obs"] must be in single_observation_space', last)
                episodes[row].append(_Episode(frames=[rows[row]]))
    return episodes


def _reset(env: Any, seeds: Sequence[int | None], **options: Any) -> tuple[Any, dict[str, Any]]:
    """`VectorEnv.reset` is declared for an int alone; vector environments take one a row, as `SyncVectorEnv` does."""
    return env.reset(seed=seeds, **options)


def _seeded(env: VectorEnv, seed: int) -> gymnasium.Space[Any]:
    space = deepcopy(env.single_action_space)
    space.seed(seed)
    return space


def _batch(env: VectorEnv, actions: Sequence[Any]) -> Any:
    return concatenate(env.single_action_space, actions, create_empty_array(env.single_action_space, len(actions)))


def _rows(env: VectorEnv, observed: Any) -> list[Any]:
    return [deepcopy(row) for row in iterate(env.observation_space, observed)]


# --- promises -----------------------------------------------------------------------------------------------------------------


def _require(ok: bool, mode: AutoresetMode, required: str, got: Any, change: str = "the environment") -> None:
    if not ok:
        raise WorldlineError(f"autoreset mode {mode.name}: {required}; got {got}. Change {change}.")


def _check_spaces(env: VectorEnv, rows: int, mode: AutoresetMode) -> None:
    _require(env.num_envs == rows, mode, f"make({rows}, ...) must give num_envs {rows}", env.num_envs)
    declared = env.metadata.get("autoreset_mode")
    _require(declared == mode, mode, f'metadata["autoreset_mode"] must be {mode}', declared)
    for name in ("observation_space", "action_space"):
        single, batch = getattr(env, f"single_{name}"), getattr(env, name)
        expected = batch_space(single, rows)
        _require(batch == expected, mode, f"{name} must be {rows} times single_{name}, {expected}", batch)


def _check_returned(env: VectorEnv, mode: AutoresetMode, observed: Any, infos: dict[str, Any]) -> None:
    _require(
        env.observation_space.contains(observed), mode, f"observations in {env.observation_space} required", observed
    )
    for key in infos:
        if not key.startswith("_"):
            mask = np.asarray(infos.get(f"_{key}"))
            ok = mask.dtype == np.bool_ and mask.shape == (env.num_envs,)
            _require(ok, mode, f'infos["_{key}"] must say which of {env.num_envs} rows have "{key}"', mask)
    if env.render_mode == "rgb_array":
        pictures: Any = env.render()
        kinds = [(x.dtype.name, x.ndim, x.shape[-1]) for x in pictures]
        wanted = [("uint8", 3, 3)] * env.num_envs
        _require(kinds == wanted, mode, f"render() must give {env.num_envs} pictures of uint8 h w 3", kinds)


def _check_outcomes(n: int, mode: AutoresetMode, reward: Any, terminated: Any, truncated: Any) -> None:
    for name, x, kind in (
        ("reward", reward, np.floating),
        ("terminated", terminated, np.bool_),
        ("truncated", truncated, np.bool_),
    ):
        ok = isinstance(x, np.ndarray) and x.shape == (n,) and np.issubdtype(x.dtype, kind)
        _require(ok, mode, f"{name} must be an array of {n}, {kind.__name__}", repr(x))
    _require(bool(np.isfinite(reward).all()), mode, "rewards must be finite", reward)


def _check_bad_actions(
    env: VectorEnv, mode: AutoresetMode, seeds: Sequence[int], batch: list[list[_Episode]], tolerance: float
) -> None:
    """What is no action is refused, and the step after it is the one that would have been without it."""
    _reset(env, list(seeds))
    good = _batch(env, [_seeded(env, s).sample() for s in seeds])
    bad = {"actions of one row too few": _batch(env, list(iterate(env.action_space, good))[1:])}
    if isinstance(env.single_action_space, Box) and np.issubdtype(good.dtype, np.floating):
        bad["actions that are NaN"] = np.full_like(good, np.nan)
    for name, actions in bad.items():
        _require(_refuses(lambda given=actions: env.step(given)), mode, f"{name} must raise an error", "none")
    for row, (now, episodes) in enumerate(zip(_rows(env, env.step(good)[0]), batch)):
        if len(episodes[0].frames) > 2:  # else the row may be at its next episode's first frame already
            _same_frame(
                now, episodes[0].frames[1], tolerance, f"{mode.name}: row {row} after an action that was refused"
            )


def _check_reset_of_a_row(env: VectorEnv, seeds: Sequence[int]) -> None:
    """The last row begins again, the others stay where they are."""
    first = _rows(env, _reset(env, list(seeds))[0])
    before = _rows(env, env.step(_batch(env, [_seeded(env, s).sample() for s in seeds]))[0])
    mask = np.arange(len(seeds)) == len(seeds) - 1
    after = _rows(env, _reset(env, list(seeds), options={"reset_mask": mask})[0])
    for row, now in enumerate(after):
        where = f"DISABLED: row {row} {'reset again by its seed' if mask[row] else 'while another was reset'}"
        _same_frame(now, first[row] if mask[row] else before[row], 0.0, where)


def _check_ended_rows_wait(env: VectorEnv, seeds: Sequence[int], steps: int) -> None:
    _reset(env, list(seeds))
    spaces = [_seeded(env, s) for s in seeds]
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(_batch(env, [space.sample() for space in spaces]))
        if (terminated | truncated).any():
            break
    refused = _refuses(lambda: env.step(_batch(env, [space.sample() for space in spaces])))
    _require(
        refused, AutoresetMode.DISABLED, "a step while a row has ended and was not reset must raise an error", "none"
    )


def _refuses(call: Callable[[], Any]) -> bool:
    try:
        call()
    except REFUSALS:
        return True
    return False


# --- comparing ----------------------------------------------------------------------------------------------------------------


def _same(a: list[list[_Episode]], b: list[list[_Episode]], tolerance: float, between: str) -> None:
    """As far as both go: modes spend steps differently."""
    for row, (one, other) in enumerate(zip(a, b)):
        for e, (x, y) in enumerate(zip(one, other)):
            where = f"{between}: row {row}, episode {e}"
            if x.ended and y.ended and len(x.frames) != len(y.frames):
                raise WorldlineError(
                    f"{where}: the same number of frames required, got {len(x.frames)} and {len(y.frames)}"
                )
            for t, (p, q) in enumerate(zip(x.frames, y.frames)):
                _same_frame(p, q, tolerance, f"{where}, frame {t}")
            for t, (p, q) in enumerate(zip(x.steps, y.steps)):
                if abs(p[0] - q[0]) > tolerance or p[1:] != q[1:]:
                    raise WorldlineError(
                        f"{where}, step {t}: the same reward, terminated and truncated required, got {p} and {q}"
                    )


def _same_frame(a: Any, b: Any, tolerance: float, where: str) -> None:
    for (name, x), (_, y) in zip(_arrays(a, "observation"), _arrays(b, "observation")):
        scale = 255 if np.issubdtype(x.dtype, np.integer) else 1
        apart = float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0.0)) / scale
        if not apart <= tolerance:
            raise WorldlineError(
                f"{where}: the same {name} required, got a difference of {apart:.3g} (accepted: {tolerance:g}). Episodes must "
                "follow from the row's own seed and actions alone."
            )


def _arrays(observed: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(observed, dict | tuple):
        for key, value in sorted(observed.items()) if isinstance(observed, dict) else enumerate(observed):
            yield from _arrays(value, f"{name}[{key!r}]")
    else:
        yield name, np.asarray(observed)
