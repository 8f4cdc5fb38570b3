"""Rules of the house that a reader relies on, held by reading the source: who may import whom, and what is never done."""

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import worldline

ROOT = Path(worldline.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# lower may not import higher; members of one level may not import each other, except within a package
LEVELS = (
    ("errors",),
    ("types",),
    ("checkpoint",),
    ("executor",),
    ("diffusion",),
    ("data",),
    ("tokenizers", "sim"),
    ("worldmodels",),
    ("policies",),
    ("rl_in_imagination",),
    ("eval",),
    ("trainers",),
    ("commands",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def own(path: Path) -> str:
    """The package, or root module, that a file belongs to: `data` of data/video.py, `types` of types.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every dotted module imported, at any depth of nesting, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: absolute imports only"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names if module == "worldline")


def parts(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The parts of worldline that are imported."""
    for module, line in imported(tree):
        head, _, rest = module.partition(".")
        name = rest.partition(".")[0]
        if head == "worldline" and name and not name.startswith("__version"):
            yield name, line


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_one_way(path: Path) -> None:
    mine = own(path)
    if mine == "__init__":
        assert not list(parts(parse(path))), "the root package imports nothing of its own"
        return
    assert mine in LEVEL, f"{mine} has no level: give it one in LEVELS"
    upward = [
        f"line {line}: {mine} imports {name}"
        for name, line in parts(parse(path))
        if name != mine and LEVEL[name] >= LEVEL[mine]
    ]
    assert not upward, "\n".join(upward)


def test_the_import_rule_would_notice() -> None:
    """The rule itself sees nested and dotted imports; without this a silent parser would pass everything."""
    tree = ast.parse("def f():\n    from worldline.trainers.loop import train\nfrom worldline import cli\nimport torch")
    assert {name for name, _ in parts(tree)} == {"cli", "trainers"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_modules_are_short_documented_and_no_drawers(path: Path) -> None:
    text = path.read_text()
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
    assert len(text.splitlines()) <= 400, f"{len(text.splitlines())} lines"
    assert not text.strip() or ast.get_docstring(parse(path)), "a module says what it is"
    assert "from __future__ import annotations" not in text, "it would switch the shape checks off"


FORBIDDEN = {"torch.load", "torch.save", "nan_to_num", "pickle", "dill", "joblib", "cloudpickle"}


def deeds(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Calls and imports by dotted name, and exception handlers that catch everything."""
    yield from imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.ExceptHandler):
            if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
                continue  # it only adds to the error on its way
            caught = [] if node.type is None else getattr(node.type, "elts", [node.type])
            if not caught or any(ast.unparse(c) in ("Exception", "BaseException") for c in caught):
                yield "broad except", node.lineno


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_unpickled_swallowed_or_repaired_in_silence(path: Path) -> None:
    found = [f"line {line}: {name}" for name, line in deeds(parse(path)) if name in FORBIDDEN | {"broad except"}]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p)",
        "import pickle",
        "x.nan_to_num()",
        "torch.nan_to_num(x)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (OSError, BaseException):\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_deed_rule_would_notice(code: str) -> None:
    assert any(name in FORBIDDEN | {"broad except"} for name, _ in deeds(ast.parse(code)))


# modules that are nothing without an extra, and say so when they are imported
NEEDS = {"worldline.rl_in_imagination.stable_baselines": "stable_baselines3"}


def test_every_public_name_resolves() -> None:
    modules = [m.name for m in pkgutil.walk_packages([str(ROOT)], "worldline.") if not m.name.endswith("__main__")]
    modules = [name for name in modules if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    assert len(modules) > 30
    listed = 0
    for name in modules:
        module = importlib.import_module(name)
        missing = [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)]
        assert not missing, f"{name}.__all__ lists {missing}"
        listed += len(getattr(module, "__all__", ()))
    assert listed > 50


def test_import_worldline_is_light() -> None:
    code = "import worldline, sys; print(sorted({'torch', 'numpy', 'av', 'pandas', 'mujoco'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "optional",
    [
        "metaworld",
        "mujoco",
        "lpips",
        "xformers",
        "wandb",
        "torchvision",
        "stable_baselines3",
        "peft",
        "transformers",
        "minari",
    ],
)
def test_the_library_imports_without_its_extras(optional: str) -> None:
    """An extra is asked for when it is used, not when the library is imported."""
    for path in FILES:
        top = ast.Module(
            body=[n for n in parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[]
        )
        found = [f"{path}:{line}" for name, line in imported(top) if name.partition(".")[0] == optional]
        assert not found, f"{optional} is imported at the top of a module: {found}"
