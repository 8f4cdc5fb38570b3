"""The part of an evaluation's page about long dreams: protocol, drift, Frechet distances, agreement of the views.

It is written from the results alone, those that `report.json` holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from worldline.eval import Report
from worldline.eval.plots import curve_bands
from worldline.eval.protocol import HORIZONS

SHOWN = {
    "moved_mse": ("Squared error on moved pixels", "squared grey levels"),
    "moved_psnr": ("PSNR on moved pixels", "dB"),
    "mse": ("Squared error", "squared grey levels"),
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", "SSIM"),
    "lpips": ("LPIPS", "LPIPS"),
    "moved_lpips": ("LPIPS on moved pixels", "LPIPS"),
}
PLOTTED = ("moved_mse", "moved_psnr", "ssim", "lpips", "moved_lpips")


def label(name: str) -> str:
    """A predictor's name for people."""
    return {"true": "imagined", "tokenizer": "reconstructed", "copy-first": "first frame repeated"}.get(
        name, f"{name} actions" if name in ("shuffled", "negated", "zeroed") else name
    )


def protocol_text(report: Report, protocol: Mapping[str, Any]) -> None:
    """One paragraph: the version, what it fixes, and where this run departs from it."""
    used = protocol["used"]
    sampling = {name: value for name, value in used.items() if name not in ("frames", "episodes", "seed")}
    told = ", ".join(
        f"{name.replace('_', ' ')} {format(value, 'g') if isinstance(value, float) else value}"
        for name, value in sampling.items()
    )
    deviations = "; ".join(protocol["deviations"]) or "none"
    report.text(
        f"Protocol **{protocol['version']}**: {protocol['context_frames']} context frame, {protocol['actions']} actions, "
        f"{told}, seed {used['seed']}, "
        f"{used['episodes']} episodes of {used['frames']} frames. Deviations: {deviations}."
    )


def long_horizon_tables(report: Report, results: Mapping[str, Any]) -> None:
    """Plots and tables of `drift`, `latent_frechet`, `fvd`, `multi_view` and `revisit`."""
    _drift(report, results["drift"])
    _frechet(report, results)
    if "multi_view" in results:
        _multi_view(report, results["multi_view"])
    else:
        report.text("Agreement of the views: not measured (no --pose-probes given).")
    if "revisit" in results:
        _revisit(report, results["revisit"])


def _revisit(report: Report, found: Mapping[str, Any]) -> None:
    names = [name for name in ("real", "reconstructed", "imagined", "dreamt absence") if name in found]

    def cell(name: str, what: str) -> str:
        got = found[name][what]
        return f"{got['rate']:.2f} [{got['low']:.2f}, {got['high']:.2f}]"

    report.table(
        "What returns after an absence: how often a probe reads the right colour and shape",
        ["frames read", "colour", "shape", "both"],
        [[name, *(cell(name, what) for what in ("colour", "shape", "both"))] for name in names],
        note=f"{found['episodes']} episodes, out of sight for {found['mean_absence']:.0f} frames on average, at least {found['away']}. By "
        f"chance: colour {found['chance']['colour']:.2f}, shape {found['chance']['shape']:.2f}. **imagined** was given the real frames up to "
        "the return, **dreamt absence** only those before the object left.",
    )


def _drift(report: Report, drift: Mapping[str, Any]) -> None:
    curves, share = drift["curves"], drift["moving"]["share"]
    cameras = dict.fromkeys(row["camera"] for row in curves)
    for measure in PLOTTED:
        title, unit = SHOWN[measure]
        for camera in cameras:
            bands = {label(r["predictor"]): r for r in curves if (r["measure"], r["camera"]) == (measure, camera)}
            if bands:
                figure = curve_bands(bands, ylabel=unit)
                report.plot(f"Drift: {title}, {camera}, over frames in which the real video moves", figure)
    columns = [h for h in HORIZONS if h <= len(share)]
    report.table(
        "Drift by imagined frame, over frames in which the real video moves",
        ["measure", "camera", "predictor", *map(str, columns)],
        [["share of episodes in motion", "", "", *(share[h - 1] for h in columns)]]
        + [
            [SHOWN[r["measure"]][0], r["camera"], label(r["predictor"]), *(r["mean"][h - 1] for h in columns)]
            for r in curves
            if r["measure"] in SHOWN
        ],
    )
    excess = drift["excess"]
    if excess["reason"]:
        report.text(f"Excess error: not measured. {excess['reason']}")
        return
    early, late = excess["bands"]
    report.table(
        f"Excess error: frames {late[0]}-{late[1]} minus frames {early[0]}-{early[1]} ({excess['unit']}, in motion)",
        ["predictor", "camera", "early", "late", "excess", "low", "high", "episodes"],
        [
            [label(p), c, r["early"], r["late"], r["mean"], r["low"], r["high"], r["episodes"]]
            for p, per_camera in excess["predictors"].items()
            for c, r in per_camera.items()
        ],
    )


def _frechet(report: Report, results: Mapping[str, Any]) -> None:
    latent, video = results["latent_frechet"], results["fvd"]
    columns = ["clips of", "frames", "distance", "low", "high", "unpaired", "real against real", "clips", "dimensions"]
    if latent["reason"]:
        report.text(f"Latent Frechet distance: {latent['reason']}.")
    else:
        note = "Of fixed features of the tokenizer's latents; not FVD. A perfect model reaches 0, and unpaired what real against real shows."
        report.table("Latent Frechet distance", columns, [_frechet_row(r) for r in latent["rows"]], note=note)
    if video["reason"]:
        report.text(f"FVD: {video['reason']}.")
    else:
        rows = [[r["camera"], *_frechet_row(r)] for r in video["rows"]]
        report.table("FVD (I3D, 16 frames of 224x224)", ["camera", *columns], rows)
    for name, found in (("Latent Frechet distance", latent), ("FVD", video)):
        for note in dict.fromkeys(r["note"] for r in found["rows"] if r["note"]):
            report.warning(f"{name}: {note}.")


def _frechet_row(r: Mapping[str, Any]) -> list[Any]:
    frames = f"{r['first']}-{r['last']}"
    return [
        label(r["predictor"]),
        frames,
        r["distance"],
        r["low"],
        r["high"],
        r["unpaired"],
        r["floor"],
        r["clips"],
        r["dims"],
    ]


def _multi_view(report: Report, found: Mapping[str, Any]) -> None:
    if found["reason"]:
        report.text(f"Agreement of the views: not measured, because {found['reason']}.")
    else:
        keys = ("horizon", "distance", "real", "excess", "low", "high")
        report.table(
            "Disagreement of two views: distance between the poses read from them, beyond that on real frames",
            ["frames", "cameras", "frame", "distance", "on real frames", "excess", "low", "high"],
            [
                [label(r["predictor"]), " / ".join(r["cameras"]), *(r[key] for key in keys)]
                for r in found["consistency"]
            ],
        )
        for pair in dict.fromkeys(tuple(r["cameras"]) for r in found["consistency"]):
            rows = [r for r in found["consistency"] if tuple(r["cameras"]) == pair]
            bands = {label(p): _by_horizon(rows, p, "excess") for p in dict.fromkeys(r["predictor"] for r in rows)}
            report.plot(
                f"Disagreement of {pair[0]} and {pair[1]} beyond real frames", curve_bands(bands, ylabel="pose")
            )
    for camera in found["cameras"]:
        rows = [r for r in found["pose_error"] if r["camera"] == camera]
        bands = {label(p): _by_horizon(rows, p, "error") for p in dict.fromkeys(r["predictor"] for r in rows)}
        report.plot(f"Pose read from {camera} against the recorded one", curve_bands(bands, ylabel="pose"))


def _by_horizon(rows: Sequence[Mapping[str, Any]], predictor: str, key: str) -> dict[str, list[Any]]:
    of = [r for r in rows if r["predictor"] == predictor]
    names = {"frame": "horizon", "mean": key, "low": "low", "high": "high"}
    return {name: [r[source] for r in of] for name, source in names.items()}
