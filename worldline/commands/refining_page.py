"""The page of a refinement: what it gained where it can be told, the curves, and what to distrust."""

from typing import Any

from worldline.commands.dreaming_page import doubt_text
from worldline.eval import Report
from worldline.eval.plots import curve_bands


def refinement_page(report: Report, results: dict[str, Any], failures: list[str]) -> None:
    for failure in failures:
        report.warning(f"The scorer failed its audit and is used by --override-audit. {failure}")
    checks, truth, best, second = results["checks"], results["truth"], results["best_iteration"], results["second"]
    first, chosen = checks[0], next(c for c in checks if int(c["iteration"]) == best)
    report.text(
        f"From held-out first frames **{first['success']:.0%}** of imagined episodes succeed before, **{chosen['success']:.0%}** "
        f"[{chosen['low']:.2f}, {chosen['high']:.2f}] with the policy of iteration {best}, which is the one in this folder. "
        f"Refinement ended because {results['stopped']}. What is imagined is not yet true: see below."
    )
    if second is not None:
        report.text(
            "A second world model, in which nothing was refined, decided what is published: there success goes from "
            f"**{first['second_success']:.0%}** to **{chosen['second_success']:.0%}** [{chosen['second_low']:.2f}, {chosen['second_high']:.2f}]."
        )
        last = checks[-1]
        gained, confirmed = last["success"] - first["success"], last["second_success"] - first["second_success"]
        if gained > 0 and confirmed < gained / 2:
            report.warning(
                f"By the last check success rose by {gained:+.2f} in the dream that the policy is refined in and by {confirmed:+.2f} in the "
                "second: at least half of it is that dream's weak spots. Hold the policy nearer to where it began (--rl.ppo.kl)."
            )
    if best == 0:
        report.warning("No check was better than the policy it began with, which is what this folder holds.")
    if truth is None:
        report.warning("Success here is imagined only. --truth SIMULATOR judges the checked policies in a simulator.")
    else:
        _truth(report, truth, best)
    if (replayed := results["replayed"]) is not None and replayed["failures"]:
        report.text(
            f"Hallucinated successes, replayed: of {replayed['failures']} held-out episodes that truly failed, the dream of their own "
            f"actions and the scorer call **{replayed['called_success']}** a success."
        )
    if (doubt := results["doubt"]) is not None:
        report.text(
            f"Imagined episodes end where two denoisings of a frame are more than {doubt['limit']:.3g} apart, which {doubt['quantile']:.0%} "
            f"of the dreams of {doubt['episodes']} held-out episodes never are. {doubt_text(doubt)}"
        )
    _curves(report, results, truth)
    columns = ["iteration", "imagined success", "95%", "averaged", "nats from the cloned policy"]
    rows = [
        [int(c["iteration"]), c["success"], f"[{c['low']:.2f}, {c['high']:.2f}]", c["smoothed"], c["real_kl"]]
        for c in checks
    ]
    if second is not None:
        columns.insert(3, "second opinion")
        for row, c in zip(rows, checks):
            row.insert(3, c["second_success"])
    note = (
        "From held-out starts; nats a decision on real frames. The policy in this folder is the one whose success"
        f"{'' if second is None else ' by the second opinion'}, averaged with the checks beside it, is highest."
    )
    report.table("Checks", columns, rows, note=note)


def _truth(report: Report, truth: dict[str, Any], best: int) -> None:
    low, high = truth["gain_interval"]
    report.text(
        f"In the simulator ({truth['simulator']}, {truth['episodes']} episodes of {truth['horizon']} control steps, paired starts) the "
        f"published policy is **{truth['gain']:+.0%}** [{low:+.2f}, {high:+.2f}] against the cloned one."
    )
    if high < 0:
        report.warning("In the simulator the refined policy is worse than the cloned one: the dream was exploited.")
    rows = [
        [
            r["iteration"],
            r["true"],
            f"[{r['true_interval'][0]:.2f}, {r['true_interval'][1]:.2f}]",
            r["imagined"],
            f"{r['called_success']} of {r['failures']}",
        ]
        for r in truth["checked"]
    ]
    columns = ["iteration", "true", "95%", "imagined", "failures called successes"]
    if "second" in truth["checked"][0]:
        columns += ["second opinion", "called so there"]
        for row, r in zip(rows, truth["checked"]):
            row += [r["second"], f"{r['second_called_success']} of {r['failures']}"]
    report.table(
        "Imagined against true success, from the same starts",
        columns,
        rows,
        note=f"The published policy is that of iteration {best}.",
    )


def _curves(report: Report, results: dict[str, Any], truth: dict[str, Any] | None) -> None:
    checks, history = results["checks"], results["history"]
    curves: dict[str, dict[str, list[Any]]] = {}
    for name, part in (("imagined, held-out starts", ""), ("second opinion, held-out starts", "second_")):
        if f"{part}success" in checks[0]:
            means = {"mean": "success", "low": "low", "high": "high"}
            curves[name] = {"frame": [c["iteration"] for c in checks]} | {
                key: [c[part + of] for c in checks] for key, of in means.items()
            }
    if truth is not None:
        rows = truth["checked"]
        curves["true"] = {
            "frame": [r["iteration"] for r in rows],
            "mean": [r["true"] for r in rows],
            "low": [r["true_interval"][0] for r in rows],
            "high": [r["true_interval"][1] for r in rows],
        }
    report.plot("Success along the refinement", curve_bands(curves, ylabel="success rate", xlabel="iteration"))
    moved = [h for h in history if "kl" in h]
    if moved:
        numbers = [h["iteration"] for h in moved]
        lines = {
            name: {"frame": numbers} | {part: [h[key] for h in moved] for part in ("mean", "low", "high")}
            for name, key in (("from the cloned policy", "kl"), ("in one iteration", "step_kl"))
        }
        report.plot("How far the policy moved", curve_bands(lines, ylabel="nats a decision", xlabel="iteration"))
