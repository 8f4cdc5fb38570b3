"""Train and held-out episodes, decided per episode by a hash, so that a longer recording keeps the same division."""

import hashlib
from collections.abc import Iterable, Mapping

from worldline.errors import DatasetError

HELD_OUT_SHARE = 0.15
HELD_OUT_NAMES = ("val", "valid", "validation", "test", "held-out")


def held_out_episodes(episodes: Iterable[int], seed: int) -> list[int]:
    """About a seventh of the episodes: those whose hash of (seed, episode) is small.

    At least one of two or more episodes, at least two of ten or more: one alone shows no spread.
    """
    ranked = sorted((_uniform(seed, episode), episode) for episode in episodes)
    if len(ranked) < 2:
        return []
    below = sum(value < HELD_OUT_SHARE for value, _ in ranked)
    return sorted(episode for _, episode in ranked[: min(max(below, 2 if len(ranked) >= 10 else 1), len(ranked) - 1)])


def _uniform(seed: int, episode: int) -> float:
    digest = hashlib.sha256(f"{seed}:{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def named_splits(splits: Mapping[str, str], total: int) -> set[int]:
    """Held-out episodes that `meta/info.json` names itself, as ranges such as "40:50". Empty if it names none."""
    chosen: set[int] = set()
    for name in HELD_OUT_NAMES:
        if name in splits:
            chosen |= _parse(name, splits[name])
    if outside := sorted(i for i in chosen if not 0 <= i < total):
        raise DatasetError(f"meta/info.json splits: episodes 0 to {total - 1} required, got {outside[:5]}. Correct it.")
    return chosen


def _parse(name: str, text: str) -> set[int]:
    try:
        start, stop = (int(part) for part in str(text).split(":"))
    except ValueError as error:
        raise DatasetError(f"meta/info.json splits.{name}: a range such as '40:50' required, got {text!r}.") from error
    return set(range(start, stop))
