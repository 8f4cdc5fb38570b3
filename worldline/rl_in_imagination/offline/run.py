"""Offline RL of several members at once, their synthetic data made anew from their own policies every so often.

    update 0      every     2 * every                      updates
       |------------|------------|---- ... ----|--------------|
    synthesise   synthesise   synthesise                   evaluate, save

What a training is stored as is one file of tensors, written atomically, and one of the synthetic data in use, so that a killed run goes
on bit for bit, whatever the synthesiser does. A NaN stops it and names the update.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from worldline.checkpoint import changes, fingerprint, read_json, read_tensors, to_json, write_json, write_tensors
from worldline.data.trajectories import Trajectories
from worldline.errors import CheckpointError, WorldlineError
from worldline.policies.states import StatePolicies
from worldline.rl_in_imagination.offline.agents import AgentConfig, Metrics, OfflineAgent, build_agent
from worldline.rl_in_imagination.offline.replay import Replay, Scaling, SyntheticTables, fit_scaling

log = logging.getLogger(__name__)
_BOOKKEEPING = ("evaluate_every", "save_every", "log_every")  # may change when a run goes on

Synthesise = Callable[[StatePolicies, int], SyntheticTables]
"""From the members' policies as they are at an update, tables of their own. Seeds and temperatures are its own affair."""
Evaluate = Callable[[StatePolicies, int], Mapping[str, Tensor]]
"""Named numbers "e", one a member, of the policies at an update."""
History = dict[str, list[tuple[int, Tensor]]]
"""Of every metric the updates it was taken at, and then one number a member. "train/..." of the agent, "eval/..." of the evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineConfig:
    """The length and the bookkeeping of a training, and the data's part in it. Batches as policy-guided diffusion has them (2404.06356)."""

    updates: int = 100_000
    """Of every seed's agent."""
    batch_size: int = 256
    """Rows of an update, for each seed."""
    synthetic: int = 240
    """Rows of a batch that are synthetic, where there is a synthesiser."""
    synthesise_every: int = 10_000
    """Updates after which synthetic data are made anew."""
    evaluate_every: int = 10_000
    """Updates between two judgements in the simulator (--task)."""
    save_every: int = 5_000
    """Updates between two saves."""
    log_every: int = 500
    """Updates between two rows of the log."""
    rewards: Literal["raw", "return-range"] = "raw"
    """raw: as they are (TD3+BC). return-range: times the longest episode's steps over the range of returns (IQL)."""
    temperature: float | None = None
    """Of the weights of good episodes among the data given, imagined ones among themselves; None: all steps alike."""

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "synthesise_every", "evaluate_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of at least 1 required, got {getattr(self, name)}")
        if self.synthetic < 0:
            raise ValueError(f"synthetic of at least 0 required, got {self.synthetic}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature above 0 required, got {self.temperature}")

    def check_synthetic(self) -> None:
        """Raise `ValueError` where a batch has no room for its synthetic rows. Without a synthesiser there are none, so that is no matter."""
        if self.synthetic > self.batch_size:
            raise ValueError(f"synthetic between 0 and batch_size {self.batch_size} required, got {self.synthetic}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRun:
    """What a training gives: the members' policies, in the order of the seeds, and what was measured on the way."""

    policies: StatePolicies
    seeds: tuple[int, ...]
    history: History
    scaling: Scaling


def train_offline(
    real: Trajectories,
    agent: AgentConfig,
    config: OfflineConfig,
    *,
    seeds: Sequence[int],
    synthesise: Synthesise | None = None,
    evaluate: Evaluate | None = None,
    out: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> OfflineRun:
    """Train one member a seed. Continues from `out/training` if that is there, and publishes each policy in `out/seed-N`.

    Args:
        provenance: plain JSON of where data and synthesiser come from; kept with the policies, and compared when a run goes on.

    Raises `CheckpointError` if what is in `out` was made with other settings or data, `WorldlineError` for NaN in the synthetic data or a
    loss, `SpecMismatch` for a task with cameras, `ValueError` for seeds that are none or not distinct, and for more synthetic rows than
    a batch has.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"distinct seeds, at least one, required, got {list(seeds)}")
    if synthesise is not None:
        config.check_synthetic()
    scaling = fit_scaling(real, rewards=config.rewards)
    learner = build_agent(agent, real.spec, scaling, seeds=seeds, updates=config.updates).to(device)
    replay = Replay(
        real,
        learner.policies,
        scaling,
        seeds=seeds,
        batch_size=config.batch_size,
        synthetic=config.synthetic if synthesise else 0,
        temperature=config.temperature,
    )
    history: History = {}
    latest: dict[str, Tensor] = {}  # metrics that wait to be noted
    settings = {**_settings(real, agent, config, seeds), "synthetic": synthesise is not None, **(provenance or {})}
    state = None if out is None else _State(out / "training", settings)
    update, made_at = (0, -1) if state is None else state.restore(learner, replay, history, latest)
    bar = tqdm(total=config.updates, initial=update, desc="offline", unit="update", disable=not progress)
    saved = -1
    try:
        while True:
            finished = update >= config.updates
            # --- new synthetic data -----------------------------------------------------------------------------------
            if synthesise and not finished and update % config.synthesise_every == 0 and made_at != update:
                tables = synthesise(learner.policies, update)
                replay.put(tables, update=update)
                made_at = update
                if state:
                    state.keep_tables(tables, update)

            # --- evaluate ---------------------------------------------------------------------------------------------
            due = finished or update % config.evaluate_every == 0
            if evaluate and due and not _noted(history, "eval", update):
                _note(history, "eval", update, evaluate(learner.policies, update))

            # --- save, stop? ------------------------------------------------------------------------------------------
            due = finished or made_at == update or (update and update % config.save_every == 0)
            if state and due and saved != update:
                state.store(learner, history, latest, update, made_at)
                saved = update
            if finished:
                break

            # --- update -----------------------------------------------------------------------------------------------
            metrics = learner.update(replay.batch(update), update)
            _require_finite(metrics, update, seeds, out)
            update += 1
            latest.update(metrics)  # a policy that learns every second update has none of its own in the others
            if update % config.log_every == 0 or update == config.updates:
                _note(history, "train", update, latest)
                latest = {}
                bar.set_postfix({name: f"{float(value.mean()):.3g}" for name, value in list(metrics.items())[:3]})
            bar.update()
    finally:
        bar.close()
    policies = learner.policies.eval()
    if out is not None:
        _publish(out, policies, seeds, history, settings, scaling)
    return OfflineRun(policies=policies, seeds=tuple(seeds), history=history, scaling=scaling)


def _publish(
    out: Path,
    policies: StatePolicies,
    seeds: Sequence[int],
    history: History,
    settings: Mapping[str, Any],
    scaling: Scaling,
) -> None:
    for member, seed in enumerate(seeds):
        facts = {name: float(points[-1][1][member]) for name, points in history.items()}
        about = {**settings, "seeds": [seed], "reward_factor": scaling.reward, **facts}
        policies.member(member).save_pretrained(out / f"seed-{seed}", provenance=about)


def _note(history: History, kind: str, update: int, metrics: Metrics) -> None:
    for name, value in metrics.items():
        history.setdefault(f"{kind}/{name}", []).append((update, value.detach().float().cpu()))


def _noted(history: History, kind: str, update: int) -> bool:
    """Whether a run that goes on from here was measured before it was stopped."""
    return any(name.startswith(f"{kind}/") and points[-1][0] == update for name, points in history.items())


def _require_finite(metrics: Metrics, update: int, seeds: Sequence[int], out: Path | None) -> None:
    for name, value in metrics.items():
        if not bool(value.isfinite().all()):
            member = int((~value.isfinite()).nonzero()[0])
            kept = "" if out is None else f" The last good state is in {out / 'training'}."
            raise WorldlineError(
                f"update {update}: a finite {name} required, got {float(value[member])} of member {member} (seed {seeds[member]}).{kept} "
                "Lower the learning rates, or look at the rewards: values that run away are what `reach_aware` is for."
            )


def _settings(real: Trajectories, agent: AgentConfig, config: OfflineConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """What must be the same where a run goes on."""
    tables = ("observations", "actions", "rewards", "next_observations", "terminated", "lengths")
    data = {name: getattr(real, name) for name in tables}
    return {
        "agent": {"name": type(agent).__name__, **to_json(agent)},
        "config": {name: value for name, value in asdict(config).items() if name not in _BOOKKEEPING},
        "seeds": list(seeds),
        "data": fingerprint(data),
        "environment": real.spec.action.embodiment,
    }


class _State:
    """A training on disk: `settings.json`, `state.safetensors` and `synthetic-N.safetensors`, made at update N."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        kept = folder / "settings.json"
        if kept.is_file():
            if changed := changes(dict.fromkeys(self.settings) | read_json(kept), self.settings):
                raise CheckpointError(
                    f"{folder.parent} holds a run with other settings:\n"
                    + "\n".join(changed)
                    + "\nUse those, or another folder."
                )
        elif (folder / "state.safetensors").is_file():
            raise CheckpointError(
                f"{kept}: what the run in {folder.parent} was made with is required to go on with it, but there is no such file: an older "
                "worldline left it. Use another folder."
            )
        else:
            write_json(kept, self.settings)

    def restore(
        self, agent: OfflineAgent, replay: Replay, history: History, latest: dict[str, Tensor]
    ) -> tuple[int, int]:
        """Fill agent, synthetic tables, history and the metrics that wait for it. Returns the update reached, and that at which the
        tables were made (or -1)."""
        if not (self.folder / "state.safetensors").is_file():
            return 0, -1
        tensors = read_tensors(self.folder / "state.safetensors")
        agent.restore(tensors)
        update, made_at = int(tensors["update"]), int(tensors["made_at"])
        if made_at >= 0:
            kept = read_tensors(self.folder / f"synthetic-{made_at}.safetensors")
            replay.put(SyntheticTables(**kept), update=made_at)
        for key, value in tensors.items():
            if key.startswith("history/at/"):
                name = key.removeprefix("history/at/")
                history[name] = list(zip(value.tolist(), tensors[f"history/value/{name}"]))
            elif key.startswith("latest/"):
                latest[key.removeprefix("latest/")] = value
        log.info("going on with %s at update %d", self.folder.parent, update)
        return update, made_at

    def keep_tables(self, tables: SyntheticTables, update: int) -> None:
        named = {f.name: x for f in fields(tables) if (x := getattr(tables, f.name)) is not None}
        write_tensors(self.folder / f"synthetic-{update}.safetensors", named)

    def store(
        self, agent: OfflineAgent, history: History, latest: Mapping[str, Tensor], update: int, made_at: int
    ) -> None:
        tensors = agent.tensors() | {"update": torch.tensor(update), "made_at": torch.tensor(made_at)}
        for name, points in history.items():
            tensors[f"history/at/{name}"] = torch.tensor([at for at, _ in points])
            tensors[f"history/value/{name}"] = torch.stack([value for _, value in points])
        tensors |= {f"latest/{name}": value for name, value in latest.items()}
        write_tensors(self.folder / "state.safetensors", tensors)
        for path in self.folder.glob("synthetic-*.safetensors"):  # no state refers to the others any more
            if path.name != f"synthetic-{made_at}.safetensors":
                path.unlink()
