"""What would make a ranking flatter itself: ranked policies in the training data, starts shared with it, policies that plan by their judges."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from worldline.checkpoint import load_config, resolve
from worldline.commands.acting import planning_folders
from worldline.data import LeRobotDataset
from worldline.errors import SimulatorError
from worldline.sim.rollout import disjoint_starts


def shared_with_training(
    policies: Sequence[str],
    *,
    world_model: Path,
    scorer: Path,
    calibration: Sequence[Path],
    truth: tuple[str, Sequence[int]] | None,
) -> list[str]:
    """One sentence for each thing shared between the ranking and the data of its judges.

    Args:
        calibration: the datasets whose replays set the threshold.
        truth: the simulator and the seeds of its starts.
    """
    used: dict[Path, list[str]] = {folder.resolve(): ["threshold"] for folder in calibration}
    missing: dict[str, list[str]] = {}
    tokenizer = resolve(world_model) / "tokenizer"
    for part, folder in (("world-model", world_model), ("tokenizer", tokenizer), ("scorer", scorer)):
        for named, root in _training_data(resolve(folder), part):
            if root is None:
                missing.setdefault(named, []).append(part)
            else:
                used.setdefault(root, []).append(part)
    found = [
        f"{named}, the data of the {', '.join(parts)}, is not here as it was: that it is independent could not be checked"
        for named, parts in missing.items()
    ]
    found += _planned(policies, {"world model": world_model, "scorer": scorer})
    learned: set[str] = set()
    for root, parts in used.items():
        recorded = [dict(p or {}) for p in LeRobotDataset(root).episode_table["provenance"].tolist()]
        found += _policies(policies, recorded, f"in {root}, the data of the {', '.join(parts)}")
        if truth is not None and "world-model" in parts:
            found += _starts(*truth, recorded, root)
            learned |= {str(p["simulator"]) for p in recorded if p.get("simulator")}
    if truth is not None and learned and truth[0] not in learned:
        found.append(
            f"the world model learned from {', '.join(sorted(learned))}, not from {truth[0]}, the truth here: what it imagines there it was "
            "never shown"
        )
    return found


def _training_data(folder: Path, part: str) -> list[tuple[str, Path | None]]:
    """Each dataset a checkpoint was trained on: its name, and where it is now (None: not found, or changed since).

    Looked for under its name, then where it was as seen from the checkpoint. A world model's copy of its tokenizer lies
    one folder deeper than the tokenizer did.
    """
    provenance = load_config(folder, part=part)["provenance"]
    named = provenance.get("data", [])
    marks = provenance.get("dataset_fingerprints", [None] * len(named))
    seen = provenance.get("data_from_here", named)
    found = []
    for name, place, mark in zip(named, seen, marks, strict=True):
        places = (Path(name), folder / place, folder.parent / place)
        found.append((str(name), next((p.resolve() for p in places if _is_dataset(p, mark)), None)))
    return found


def _is_dataset(root: Path, fingerprint: str | None) -> bool:
    if not (root / "meta/info.json").is_file():
        return False
    return fingerprint is None or LeRobotDataset(root).fingerprint == fingerprint


def _planned(policies: Sequence[str], judges: Mapping[str, Path]) -> list[str]:
    """Policies that choose what pleases those who judge them."""
    found = []
    for name in policies:
        own = {resolve(folder).resolve() for folder in planning_folders(name)}
        same = [part for part, folder in judges.items() if resolve(folder).resolve() in own]
        if same:
            found.append(
                f"{name} plans with the {' and the '.join(same)} of this ranking: its imagined success flatters it"
            )
    return found


def _policies(policies: Sequence[str], recorded: Sequence[Mapping[str, str]], where: str) -> list[str]:
    seen = {_same(str(p.get("policy"))) for p in recorded}
    ranked = dict.fromkeys(name.partition("@")[0] for name in policies)
    return [f"rollouts of {name} are {where}: its rank flatters itself" for name in ranked if _same(name) in seen]


def _same(policy: str) -> str:
    """A policy's name without corruption; of a folder the whole path."""
    name = policy.partition("@")[0]
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _starts(world: str, seeds: Sequence[int], recorded: Sequence[Mapping[str, str]], root: Path) -> list[str]:
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
