"""What `eval` measures a world model with: probes, a second world model, a scorer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldline.commands.sampling import load_dream, load_scorer
from worldline.errors import WorldlineError
from worldline.eval.consistency import by_camera
from worldline.eval.probes import Probe
from worldline.rl_in_imagination.dream import Dream
from worldline.rl_in_imagination.success import SuccessScorer
from worldline.types import WorldSpec, require_match
from worldline.worldmodels import AutoregressiveWorldModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalJudges:
    """What `eval` measures with, all of it made for the world model's cameras."""

    action_free: Dream | None
    probe: Probe | None
    inverse_model: Probe | None
    pose_probes: Mapping[str, Probe]
    identity: Probe | None
    scorer: SuccessScorer | None


def load_judges(
    spec: WorldSpec,
    *,
    sampling: Mapping[str, Any],
    action_free: Path | None,
    probe: Path | None,
    inverse_model: Path | None,
    pose_probes: Sequence[Path],
    identity_probe: Path | None,
    scorer: Path | None,
) -> EvalJudges:
    """Open what was named. Raises `SpecMismatch` for what does not fit the world model `spec` is of, `WorldlineError` for another kind."""
    judges = EvalJudges(
        action_free=load_dream(action_free, _without_actions(sampling)) if action_free else None,
        probe=Probe.from_pretrained(probe) if probe else None,
        inverse_model=Probe.from_pretrained(inverse_model) if inverse_model else None,
        pose_probes=by_camera({f"--pose-probes {path}": Probe.from_pretrained(path) for path in pose_probes}),
        identity=Probe.from_pretrained(identity_probe) if identity_probe else None,
        scorer=load_scorer(scorer) if scorer else None,
    )
    for one, flag, targets in (
        (judges.probe, "--probe", ("object", "state")),
        (judges.inverse_model, "--inverse-model", ("action",)),
        (judges.identity, "--identity-probe", ("identity",)),
    ):
        if one is not None and one.config.target not in targets:
            raise WorldlineError(
                f"{flag}: a probe of {' or '.join(targets)} is required (worldline train probe --target {targets[0]}), got one of "
                f"{one.config.target}"
            )
    if judges.action_free is not None:
        model = judges.action_free.world_model
        if not isinstance(model, AutoregressiveWorldModel) or model.config.network.actions:
            raise WorldlineError(
                f"--action-free: a world model trained with --model.network.actions False is required, {action_free} is told its actions"
            )
        require_match(spec, judges.action_free.spec, between="world model and --action-free")
    for judge, flag, only in (
        (judges.probe, "--probe", ("cameras",)),
        (judges.inverse_model, "--inverse-model", ("cameras", "control_steps")),
        (judges.identity, "--identity-probe", ("cameras",)),
        (judges.scorer, "--scorer", ("cameras", "control_steps")),
        *((probe, "--pose-probes", ("cameras", "pose_names")) for probe in judges.pose_probes.values()),
    ):
        if judge is not None:
            require_match(spec, judge.spec, between=f"world model and {flag}", only=only)
    return judges


def _without_actions(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings for a model that knows no actions: there is nothing to guide it by."""
    return {name: value for name, value in sampling.items() if name != "guidance"}
