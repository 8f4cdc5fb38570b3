"""The Markdown tables of docs/results.md, from the `results` of reports (their keys: docs/reports.md)."""

from collections.abc import Sequence
from typing import Any

PREDICTORS = ("true", "shuffled", "action-free", "copy-first", "tokenizer")
WORLD_MODEL = (
    "| camera | frame | imagined | shuffled actions | action-free | first frame repeated | tokenizer alone "
    "| gain over repeating | gain over action-free |"
)
OBJECT = "| object position error, pixels | frame 10 | 20 | 30 | 40 | where it moved: 20 | 30 | 40 |"
RANKING = (
    "| task, seed | policies | r | over policies | over rollouts | one a lineage | ρ | MMRV | perfect model | bias | regret "
    "| r of the ten true alone | corrected |"
)


def table(head: str, rows: Sequence[str]) -> str:
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def world_model(found: dict[str, Any]) -> str:
    """PSNR on moved pixels by camera and horizon, and paired gains over both trivial predictors."""
    at = {(h["predictor"], h["camera"], h["horizon"]): h["moved_psnr"] for h in found["horizons"]}
    gains = {(g["baseline"], g["camera"], g["horizon"]): g for g in found["against"]}

    def psnr(*key: Any) -> str:
        return f"{at[key]:.1f}" if at.get(key) is not None else "–"

    def gain(*key: Any) -> str:
        g = gains.get(key)
        return "–" if g is None else f"{g['gain_db']:+.1f} [{g['low']:.1f}, {g['high']:.1f}]"

    rows = [
        row(
            camera,
            t,
            *(psnr(p, camera, t) for p in PREDICTORS),
            *(gain(b, camera, t) for b in ("copy-first", "action-free")),
        )
        for camera, t in dict.fromkeys((h["camera"], h["horizon"]) for h in found["horizons"])
    ]
    return table(WORLD_MODEL, rows)


def object_position(found: dict[str, Any]) -> str:
    """The probe's error on imagined frames, beside its own on true ones."""
    names = {
        "true": "imagined",
        "copy-first": "first frame repeated",
        "tokenizer": "tokenizer alone",
        "real": "true frames",
    }
    rows = []
    for predictor, said in names.items():
        o = found["object_position"][predictor]
        errors = [o["error_at"][t] for t in ("10", "20", "30", "40")]
        errors += [o["error_at_where_it_moved"][t] for t in ("20", "30", "40")]
        rows.append(row(said, *(f"{e:.1f}" for e in errors)))
    return table(OBJECT, rows)


def ranking_row(task: str, seed: int, found: dict[str, Any]) -> str:
    s, corrected = found["statistics"], (found["corrected"] or {}).get("pearson", {})
    floor = s["mmrv_perfect_floor"]
    return row(
        f"{task}, {seed}",
        len(s["policies"]),
        number(s["pearson"]),
        _span(s["pearson_interval_policy"]),
        _span(s["pearson_interval_rollouts"]),
        number(s["pearson_independent"]),
        number(s["spearman"]),
        number(s["mmrv"], 3),
        f"{floor['mean']:.3f} {_span(floor)}" if floor else "–",
        f"{s['bias']:+.2f}",
        number(s["top1_regret"]),
        number(corrected.get("real_only")),
        number(corrected.get("corrected")),
    )


def policies(seeds: Sequence[dict[str, Any]]) -> str:
    """True and imagined success of every policy of one task; the truth is the same for all seeds."""
    head = "| policy | true success [95%] |" + "".join(f" imagined, seed {i} [95%] |" for i in range(len(seeds)))
    first = sorted(seeds[0]["policies"], key=lambda p: -p["real"])
    imagined = [{p["policy"]: p for p in found["policies"]} for found in seeds]
    rows = [
        row(
            p["policy"],
            f"{p['real']:.2f} {_span(p['real_interval'])}",
            *(f"{by[p['policy']]['imagined']:.2f} {_span(by[p['policy']]['imagined_interval'])}" for by in imagined),
        )
        for p in first
    ]
    return table(head, rows)


def _span(interval: dict[str, float] | None) -> str:
    return "–" if interval is None else f"[{interval['low']:.2f}, {interval['high']:.2f}]"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
