"""The pages for people, held to the code: snippets run, command lines parse, links and paths lead somewhere."""

import argparse
import dataclasses
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro

from worldline import cli
from worldline.data import LeRobotDataset
from worldline.eval import (
    EvaluationProtocol,
    ExcessRatio,
    PolicyContrasts,
    PredictionPowered,
    RankStatistics,
    ScorerCalibration,
)
from worldline.eval.report import REPORT_KEYS
from worldline.worldmodels import load_world_model

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("checkpoints/*/*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[list[str]]:
    """The commands of a shell block, without comments, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the real command line up to the point where work would begin; returns the config that was parsed."""
    found: list[Any] = []

    def stub(config: Any) -> Path:
        found.append(config)
        return tmp_path

    stubbed = (
        *(
            (f"trainers.{stage}", "run")
            for stage in (
                "tokenizer",
                "world_model",
                "world_model_edm",
                "world_models",
                "video_action",
                "scorer",
                "policy",
                "offline",
                "trajectory",
                "dynamics",
                "inverse",
                "probe",
            )
        ),
        *(("commands.recording", f"run_{verb}") for verb in ("record", "inspect")),
        *(("commands.dreaming", f"run_{verb}") for verb in ("imagine", "eval")),
        ("commands.ranking", "run_rank"),
        ("commands.refining", "run_refine"),
        ("commands.synthesizing", "run_synthesize"),
        ("commands.synthesizing_trajectories", "run_synthesize_trajectories"),
        ("commands.offline_rl", "run_offline_rl"),
        ("commands.posttraining", "run_posttrain"),
        ("commands.labeling", "run_label"),
        ("commands.showing", "run_show"),
    )
    # all imported before any is stubbed: a module imported later would keep another one's stub for good
    imported = [(importlib.import_module(f"worldline.{module}"), function) for module, function in stubbed]
    for module, function in imported:
        monkeypatch.setattr(module, function, stub)

    def run(words: list[str]) -> Any:
        found.clear()
        try:
            cli.main(words)
        except SystemExit as stopped:
            pytest.fail(f"worldline {shlex.join(words)}: exits with {stopped.code}")
        assert len(found) == 1, f"worldline {shlex.join(words)}: runs nothing"
        return found[0]

    return run


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    snippets = blocks(ROOT / "README.md", "python")
    assert len(snippets) >= 2
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = "\n".join(snippets)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "MMRV 0.075" in ran.stdout


def test_the_recipe_for_droid_runs_from_the_drawing_to_the_dream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/data.md as it stands, on two short episodes of small frames and two training steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path / "cache"))
    page = ROOT / "docs/data.md"
    (draw,) = [w for b in blocks(page, "bash") for w in command_lines(b) if "make_droid_like.py" in w[1]]
    monkeypatch.setattr(sys, "argv", [*draw[1:], "--episodes", "2", "--frames", "30", "--size", "32x48"])
    runpy.run_path(str(ROOT / draw[1]), run_name="__main__")
    recipe, labels = blocks(page, "python")
    exec(compile(recipe, str(page), "exec"), {})
    spec = LeRobotDataset("data/droid-cartesian").spec  # opened without arguments: it now says itself what it holds
    assert (spec.action.kind, spec.action.space, spec.action.dim) == ("absolute", "cartesian", 7)
    assert spec.pose_names == spec.action.names and len(spec.cameras) == 3

    short = {"tokenizer": ["--max-steps", "2"], "world-model": ["--max-steps", "2", "--loop.batch-size", "1"]}
    (verbs,) = [command_lines(b) for b in blocks(page, "bash") if "droid-wm" in b]
    assert [words[1] for words in verbs] == ["inspect", "train", "train", "imagine"]
    for words in verbs:
        assert cli.main([*words[1:], *short.get(words[2], [])]) in (None, 0), f"{shlex.join(words)} failed"
    assert (tmp_path / "droid.mp4").stat().st_size > 1000
    assert load_world_model("runs/droid-wm")[0].spec.control_steps == 3

    exec(compile(labels, str(page), "exec"), {})
    good, bad = (LeRobotDataset("data/droid-labelled").episode(i) for i in (0, 1))
    assert good.success and good.frame_success is not None
    assert good.frame_success.sum() == 7 and good.frame_success[-7:].all()  # half a second at 15 Hz
    assert bad.success is False and bad.frame_success is not None and not bad.frame_success.any()


def test_command_lines_parse(parse: Any) -> None:
    commands = [(p, w) for p in PAGES for b in blocks(p, "bash") for w in command_lines(b) if w[0] == "worldline"]
    verbs = {
        (words[1], words[2]) if words[1] == "train" else (words[1],) for page, words in commands if page == PAGES[0]
    }
    wanted = {(verb,) for verb in cli.VERBS if verb != "train"} | {("train", stage) for stage in cli.STAGES}
    assert verbs == wanted, "the README shows every verb and every stage"
    for _, words in commands:
        parse(words[1:])


def test_command_lines_of_scripts_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts run up to the point where their arguments are parsed."""

    class Parsed(Exception):
        pass

    def then_stop(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_only(*args: Any, **options: Any) -> None:
            parse(*args, **options)
            raise Parsed

        return parse_only

    monkeypatch.setattr(tyro, "cli", then_stop(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
    commands = [w for p in PAGES for b in blocks(p, "bash") for w in command_lines(b) if w[0] == "python"]
    assert commands
    for words in commands:
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.syspath_prepend(str((ROOT / words[1]).parent))  # as python itself does
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def test_the_first_session_of_the_help_parses(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  worldline ")]
    assert len(lines) >= 5
    for words in lines:
        parse(words)


def test_a_wrong_flag_would_be_noticed(parse: Any) -> None:
    with pytest.raises(pytest.fail.Exception, match="exits with 2"):
        parse(["inspect", "data/drawer", "--no-such-flag"])


@pytest.mark.parametrize("budget", ["smallest", "default", "hours"])
def test_the_quickstarts_commands_parse(parse: Any, tmp_path: Path, budget: str) -> None:
    """The script runs with a `worldline` that only writes down how it was called."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/quickstart.sh").write_bytes((ROOT / "scripts/quickstart.sh").read_bytes())
    (tmp_path / "scripts/setup.sh").write_text("true\n")
    fake = tmp_path / ".venv/bin/worldline"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/usr/bin/env bash\nprintf "%s\\t" "$@" >> "{tmp_path}/calls"\necho >> "{tmp_path}/calls"\n')
    fake.chmod(0o755)
    command = ["bash", "scripts/quickstart.sh", "--budget", budget, "--out", str(tmp_path / "out"), "--seed", "3"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    calls = [line.rstrip("\t").split("\t") for line in (tmp_path / "calls").read_text().splitlines()]
    assert [words[0] for words in calls if words[0] != "train"] == ["record", "inspect", "imagine", "eval", "rank"]
    for words in calls:
        config = parse(words)
        assert words[0] != "train" or config.loop.seed == 3


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_scripts_and_links_exist(page: Path) -> None:
    text = page.read_text()
    scripts = {word for block in blocks(page, "bash") for words in command_lines(block) for word in words}
    paths = {ROOT / word for word in scripts if re.fullmatch(r"(\./)?(scripts|tests)/[\w./-]+", word)}
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    paths |= {page.parent / link for link in links if not re.match(r"\w+:", link)}
    # a name in backquotes with a slash and a suffix is a file of this repository
    paths |= {ROOT / name for name in re.findall(r"`((?:worldline|tests|scripts|docs)/[\w./-]*\w\.\w+)`", text)}
    missing = sorted(str(path) for path in paths if not path.exists())
    assert not missing, missing
    locked = sorted(w for w in scripts if w.startswith("./") and not os.access(ROOT / w, os.X_OK))
    assert not locked, f"started as ./..., but not executable: {locked}"


def test_the_tree_names_what_there_is() -> None:
    (tree,) = blocks(ROOT / "README.md", "tree")
    named: set[str] = set()
    parent = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            parent = name if name.endswith("/") else ""
        named.add(name if not line.startswith(" ") else parent + name)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing
    folders = {f"worldline/{path.parent.name}/" for path in (ROOT / "worldline").glob("*/__init__.py")}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert folders | pages <= named, "every folder of the package and every page has its line"


@pytest.mark.parametrize(
    "cls", [RankStatistics, PolicyContrasts, PredictionPowered, ScorerCalibration, EvaluationProtocol, ExcessRatio]
)
def test_every_key_of_a_report_is_explained(cls: type) -> None:
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", (ROOT / "docs/reports.md").read_text()))))
    missing = [field.name for field in dataclasses.fields(cls) if field.name not in words]
    assert not missing, missing
    assert set(REPORT_KEYS) <= words
