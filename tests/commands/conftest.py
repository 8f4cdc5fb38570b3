"""One dot world recorded and learned through the command line, once for the whole folder."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands.dots import SIZE, WORLD
from worldline.cli import main

HORIZON = ["--horizon", "20", "--control-steps", "2"]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a command did: exit code and both streams."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


def run_main(*arguments: object) -> int:
    """The exit code of `worldline arguments...`; any exception that escapes is a traceback, so a failure."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@pytest.fixture
def worldline(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = run_main(*arguments)
        said = capsys.readouterr()
        return Said(code=code, out=said.out, err=said.err)

    return run


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Folders of everything made once."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    @property
    def policies(self) -> list[Path]:
        return [self.bc, self.diffusion, self.other]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(root=tmp_path_factory.mktemp("lab"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDLINE_CACHE", str(lab.root / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        make(lab)
        yield lab


def make(lab: Lab) -> None:
    record(lab.data, 20)
    train = ["--loop.warmup", 1, "--loop.batch-size", 4]
    network = ["--model.network.width", 32, "--model.network.depth", 1, "--model.network.heads", 2]
    do("train", "tokenizer", "--data", lab.data, "--out", lab.tok, "--kind", "patches", "--patch", 8)
    do("train", "world-model", "--data", lab.data, "--tokenizer", lab.tok, "--out", lab.wm, "--max-steps", 6,
       "--frames", 4, "--model.network.window", 4, *network, *train)  # fmt: skip
    do("train", "scorer", "--data", lab.data, "--tokenizer", lab.tok, "--out", lab.scorer, "--max-steps", 40,
       "--scorer.encoder.channels", 8, 8, "--scorer.encoder.features", 16, "--loop.warmup", 1,
       "--loop.batch-size", 32, "--loop.lr", 5e-3)  # fmt: skip
    for folder, kind, seed in ((lab.bc, "bc", 0), (lab.diffusion, "diffusion", 0), (lab.other, "bc", 1)):
        do("train", "policy", "--data", lab.data, "--out", folder, "--kind", kind, "--max-steps", 3, "--loop.seed", seed,
           "--policy.encoder.channels", 8, 8, "--policy.encoder.features", 16, "--policy.encoder.size", 16,
           "--policy.chunk", 4, *train)  # fmt: skip


def record(out: Path, episodes: int, *options: object) -> None:
    settings: list[object] = ["--size", SIZE] if "--size" not in options else []
    settings += HORIZON if "--horizon" not in options else []
    do("record", WORLD, "--out", out, "--episodes", episodes, "--policy", "tests.commands.dots:mixed", "--processes", 1,
       *settings, *options)  # fmt: skip


def do(*arguments: object) -> None:
    assert run_main(*arguments) == 0, arguments


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, to compare before and after."""
    return {os.path.relpath(p, folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
