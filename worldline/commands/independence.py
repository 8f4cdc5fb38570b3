"""What would make a ranking flatter itself: ranked policies in the training data, or starts shared with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from worldline.checkpoint import load_config, resolve
from worldline.data import LeRobotDataset
from worldline.errors import SimulatorError
from worldline.sim.rollout import disjoint_starts


def shared_with_training(
    policies: Sequence[str],
    *,
    world_model: Path,
    scorer: Path,
    calibration: Path | None,
    truth: tuple[str, Sequence[int]] | None,
) -> list[str]:
    """One sentence for each thing shared between the ranking and the data of its judges.

    Args:
        calibration: the dataset whose replays set the threshold.
        truth: the simulator and the seeds of its starts.
    """
    used: dict[str, list[str]] = {} if calibration is None else {str(calibration): ["threshold"]}
    tokenizer = resolve(world_model) / "tokenizer"
    for part, folder in (("world-model", world_model), ("tokenizer", tokenizer), ("scorer", scorer)):
        for root in load_config(resolve(folder), part=part)["provenance"].get("data", []):
            used.setdefault(str(root), []).append(part)
    found = []
    for root, parts in used.items():
        judge = ", ".join(parts)
        if not (Path(root) / "meta/info.json").is_file():
            found.append(f"{root}, the data of the {judge}, is not here: that it is independent could not be checked")
            continue
        recorded = [dict(p or {}) for p in LeRobotDataset(root).episode_table["provenance"].tolist()]
        found += _policies(policies, recorded, f"in {root}, the data of the {judge}")
        if truth is not None and "world-model" in parts:
            found += _starts(*truth, recorded, root)
    return found


def _policies(policies: Sequence[str], recorded: Sequence[Mapping[str, str]], where: str) -> list[str]:
    seen = {str(p.get("policy")).partition("@")[0] for p in recorded}
    ranked = dict.fromkeys(name.partition("@")[0] for name in policies)
    return [f"rollouts of {name} are {where}: its rank flatters itself" for name in ranked if name in seen]


def _starts(world: str, seeds: Sequence[int], recorded: Sequence[Mapping[str, str]], root: str) -> list[str]:
    trained = [int(p["seed"]) for p in recorded if str(p.get("seed")).isdigit() and p.get("simulator") == world]
    if not trained:
        return []
    try:
        check = disjoint_starts(world, seeds, trained)
    except SimulatorError as error:
        return [f"that no true start is in {root} could not be checked: {error}"]
    if check.disjoint:
        return []
    shared = len({true for true, _ in check.same})
    return [f"{shared} of {len(seeds)} true starts are also starts of {root}: results are not on held-out states"]
