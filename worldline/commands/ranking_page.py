"""The page of a ranking: tables, plots and remarks from what `eval.ranking` found."""

from typing import Any

from worldline.commands.dreaming_page import add_diagnostic
from worldline.eval import Interval, PerfectModel, Report, ranking_scatter, success_bars
from worldline.eval.ranking import Ranked, ReplayDiagnostic, policy_table

MEASURES_SAID = {"pearson": "r", "mmrv": "MMRV", "bias": "bias", "mean_absolute_error": "mean absolute error"}


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _span(interval: dict[str, Any] | Interval | PerfectModel | None) -> str:
    if interval is None:
        return "–"
    low, high = (interval["low"], interval["high"]) if isinstance(interval, dict) else (interval.low, interval.high)
    return f"[{low:.2f}, {high:.2f}]"


def ranking_page(
    report: Report,
    has_data: bool,
    ranked: Ranked,
    diagnostic: ReplayDiagnostic | None,
    results: dict[str, Any],
    warnings: list[str],
) -> None:
    for warning in warnings:
        report.warning(warning)
    rows = results["policies"]
    best = rows[0]
    again = best["imagined_starts"] < best["imagined_episodes"]
    report.text(
        f"**{best['policy']}** looks best in imagination: {best['imagined']:.0%} of {best['imagined_episodes']} imagined "
        f"episodes succeed (95% interval {_span(best['imagined_interval'])}). Policies that share a letter cannot be told "
        f"apart with this many {'starts' if again else 'episodes'}."
    )
    if again:
        report.warning(
            f"The {best['imagined_episodes']} imagined episodes of a policy begin at {best['imagined_starts']} real frames, each dreamt from "
            "several times. Dreams from one start hardly differ: intervals and letters count starts. More --data gives more of them."
        )
    columns = ["policy", "imagined success", "95% interval", "letters", "actions clipped"]
    clipped = {r["policy"]: r["outside"] / r["values"] for r in results["actions_out_of_range"]}
    cells = [
        [
            r["policy"],
            f"{r['imagined']:.0%}",
            _span(r["imagined_interval"]),
            r["letters"],
            f"{clipped[r['policy']]:.1%}",
        ]
        for r in rows
    ]
    if diagnostic is not None and diagnostic.threshold_interval is not None:
        columns.append("by threshold")
        cells = [[*c, _span(r["imagined_by_threshold"])] for c, r in zip(cells, rows)]
    if ranked.truth is not None:
        columns += ["true success", "95% interval (true)"]
        cells = [[*c, f"{r['real']:.0%}", _span(r["real_interval"])] for c, r in zip(cells, rows)]
    report.table("Ranking", columns, cells, note=_threshold_note(diagnostic))
    if ranked.statistics is not None:
        _agreement(report, ranked)
    names = [r["policy"] for r in rows]
    rates = {"imagined": [r["imagined"] for r in rows]}
    intervals = {"imagined": [Interval(**r["imagined_interval"]) for r in rows]}
    if ranked.truth is not None:
        rates["true"] = [r["real"] for r in rows]
        intervals["true"] = [Interval(**r["real_interval"]) for r in rows]
    report.plot("Success by policy", success_bars(rates, intervals, names))
    add_change(report, results["change"], before="--against", after="this one")
    _gaps(report, results)
    _correction(report, ranked)
    needed = [[n.a, n.b, n.difference, n.total] for n in ranked.contrasts.neighbours]
    report.table(
        f"Imagined {'starts' if again else 'rollouts'} each that would separate neighbours (80% power)",
        ["policy", "next", "difference", "starts" if again else "rollouts"],
        needed,
    )
    if diagnostic is not None:
        add_diagnostic(report, diagnostic)
    elif not has_data:
        report.warning("No --data given: the replay diagnostic, the cheapest test of model and scorer, was not run.")


def change_rows(change: dict[str, Any]) -> list[list[str]]:
    """How two rankings agree with the truth: of each measure its name, before, after, and the difference with its interval."""
    rows = []
    for name, said in MEASURES_SAID.items():
        m = change["measures"][name]
        both = m["before"] is not None and m["after"] is not None
        span = "–" if m["low"] is None else f"[{m['low']:+.3f}, {m['high']:+.3f}]"
        difference = f"{m['after'] - m['before']:+.3f} {span}" if both else "–"
        rows.append([said, _number(m["before"]), _number(m["after"]), difference])
    return rows


def add_change(report: Report, change: dict[str, Any] | None, *, before: str, after: str, note: str = "") -> None:
    """Which of two world models ranks better, if it was asked."""
    if change is None:
        return
    report.table(
        f"Does it rank better? {len(change['policies'])} policies, the same {change['episodes']} true starts",
        ["agreement with the simulator", before, after, "difference, 95% interval"],
        change_rows(change),
        note="Paired over starts, for these very policies. r and MMRV of few policies move by little things: look at the policies' rates too."
        + note,
    )


def _gaps(report: Report, results: dict[str, Any]) -> None:
    """Where a gap between imagined and true success comes from, if it was asked."""
    if (through := results["through_tokenizer"]) is not None:
        report.table(
            f"Where the gap comes from: true success in the same {through['episodes']} episodes",
            ["policy", "on true frames", "on frames through the tokenizer", "95% interval", "imagined"],
            [
                [
                    p["policy"],
                    f"{p['real']:.0%}",
                    f"{p['through']:.0%}",
                    _span(p["through_interval"]),
                    f"{p['imagined']:.0%}",
                ]
                for p in through["policies"]
            ],
        )
    if (own := results["own_actions"]) is not None:
        report.table(
            f"The actions taken in imagination, in the simulator: the same {own['episodes']} starts",
            [
                "policy",
                "true",
                "imagined",
                "true, by imagined actions",
                "95% interval",
                "episodes judged alike",
                "95% interval (alike)",
            ],
            [
                [
                    p["policy"],
                    f"{p['real']:.0%}",
                    f"{p['imagined']:.0%}",
                    f"{p['own_actions']:.0%}",
                    _span(p["own_actions_interval"]),
                    f"{p['agreement']:.0%}",
                    _span(p["agreement_interval"]),
                ]
                for p in own["policies"]
            ],
            note="Judged alike: dream and simulator say the same of the same actions. Where they mostly do and rates differ all "
            "the same, the policy did other things in the dream: it saw something else there.",
        )


def _threshold_note(diagnostic: ReplayDiagnostic | None) -> str:
    if diagnostic is None or (between := diagnostic.threshold_interval) is None:
        return ""
    return (
        f"By threshold: imagined success were the threshold ({diagnostic.threshold:.2g}) at either end of what other "
        f"replays could have made it, {between.low:.2g} to {between.high:.2g}. Wide: replay more episodes (--data)."
    )


def _agreement(report: Report, ranked: Ranked) -> None:
    s = ranked.statistics
    assert s is not None
    real = {r["policy"]: r for r in policy_table(ranked)}
    report.plot(
        "Imagined against true success",
        ranking_scatter(
            s,
            real_intervals=[Interval(**real[n]["real_interval"]) for n in s.policies],
            imagined_intervals=[Interval(**real[n]["imagined_interval"]) for n in s.policies],
        ),
    )
    floor, ceiling = s.mmrv_perfect_floor, s.pearson_perfect_ceiling
    rows = [
        [
            "Pearson r",
            _number(s.pearson),
            f"policies {_span(s.pearson_interval_policy)}, rollouts {_span(s.pearson_interval_rollouts)}, jackknife {_span(s.pearson_jackknife)}",
        ],
        [
            "r, one policy a lineage",
            _number(s.pearson_independent),
            _span(
                Interval(
                    low=s.pearson_independent_range[0], high=s.pearson_independent_range[1], level=1.0, method="range"
                )
            )
            if s.pearson_independent_range
            else "–",
        ],
        [
            "r of a perfect model at these counts",
            _number(ceiling.mean if ceiling else None),
            _span(ceiling),
        ],
        ["Spearman ρ", _number(s.spearman), ""],
        ["Kendall τ", _number(s.kendall), ""],
        ["MMRV", _number(s.mmrv), f"{s.mmrv_convention}; rollouts {_span(s.mmrv_interval_rollouts)}"],
        [
            "MMRV of a perfect model at these counts",
            _number(floor.mean if floor else None),
            _span(floor),
        ],
        ["bias (imagined - true)", f"{s.bias:+.3f}", _span(s.bias_interval_rollouts)],
        ["top-1 regret", _number(s.top1_regret), "true success lost by taking imagination's favourite"],
        [
            "permutation p",
            _number(s.permutation_p, 4),
            f"no smaller than {s.permutation_floor:.2g} is possible with {len(s.policies)} policies",
        ],
        [
            "leave-one-out r",
            "",
            _span(Interval(low=s.leave_one_out_range[0], high=s.leave_one_out_range[1], level=1.0, method="range"))
            if s.leave_one_out_range
            else "–",
        ],
    ]
    report.table("Agreement with the truth", ["", "value", "95% interval, remark"], rows)
    for note in s.notes:
        report.text(f"*{note}*")


def _correction(report: Report, ranked: Ranked) -> None:
    found = ranked.corrected
    if not found or not found["policies"]:
        return
    m = found["real_rollouts"]
    rows = [
        [
            p["policy"],
            p["imagined_only"],
            p["real_only"],
            _span(p["real_only_interval"]),
            p["estimate"],
            _span(p["interval"]),
            p["truth_mean"],
        ]
        for p in found["policies"]
    ]
    report.table(
        f"Bias correction with {m} true rollouts a policy (prediction-powered inference)",
        [
            "policy",
            "imagined alone",
            f"{m} true alone",
            "95% interval",
            "corrected",
            "95% interval (corrected)",
            "all true rollouts",
        ],
        rows,
    )
