"""Output folders of the verbs: what may be written where, and the command that a report repeats."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from worldline.errors import WorldlineError

# what a training run and a recording leave in their folder before anything of value
CLAIMS = ("training/run.json", "training/settings.json", ".staging/settings.json", ".staging/recording.json")


def check_report_folder(out: Path) -> None:
    """Raise `WorldlineError` unless `out` is new, empty, or holds an earlier report: nothing else is written over."""
    if out.is_dir():
        held = sorted(path.name for path in out.iterdir())
        if not held or {"report.json", "rollouts"} & set(held):
            return
        got = f"it holds {', '.join(held[:4])}"
    elif out.exists():
        got = "it is a file"
    else:
        return
    raise WorldlineError(f"--out {out}: a new or empty folder, or one of an earlier report, is required; {got}.")


def report_results(folder: Path) -> dict[str, Any]:
    """What a verb told programs in `folder`/report.json. Raises `WorldlineError` where there is none."""
    path = folder / "report.json"
    if not path.is_file():
        raise WorldlineError(f"the folder of a report is required, {path} is not there")
    return json.loads(path.read_text())["results"]


def check_video_file(out: Path) -> None:
    """Raise `WorldlineError` unless `out` names an mp4 file in a folder that is there or can be made."""
    if out.suffix != ".mp4" or out.is_dir():
        raise WorldlineError(f"--out: the name of a video file ending in .mp4 is required, got {out}.")
    if blocked := [path for path in out.parents if path.exists() and not path.is_dir()]:
        raise WorldlineError(f"--out {out}: {blocked[0]} is a file, a folder is required there.")


def claimed(out: Path) -> bool:
    """Whether some run holds `out`, this one or another that is going on there."""
    return any((out / name).exists() for name in CLAIMS)


def release_claim(out: Path) -> None:
    """Take back the claim on `out` of a run that ended before it saved anything: a mistake must not bind the folder. Only whoever found it
    free before (not `claimed`) may do so."""
    held = [path for path in out.rglob("*") if not path.is_dir()]
    if not held or any(path.relative_to(out).as_posix() not in CLAIMS for path in held):
        return
    for path in held:
        path.unlink()
    for folder in sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()
    out.rmdir()


def command_line(verb: str, config: Any) -> str:
    """The command that gives `config`: every field that is not at its default, those of nested settings as `--rl.rows 8`."""
    return shlex.join(["worldline", verb, *_flags(config, "")])


def _flags(config: Any, prefix: str) -> list[str]:
    parts: list[str] = []
    for f in fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name.replace('_', '-')}"
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value is None or (default is not MISSING and value == default):
            continue
        if is_dataclass(value):
            parts += _flags(value, f"{name}.")
        elif isinstance(value, Mapping):
            parts += [f"--{name}", *(str(part) for pair in value.items() for part in pair)]
        else:
            parts += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return parts
