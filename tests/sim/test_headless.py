"""The choice of a GL backend, without importing MuJoCo."""

import ctypes.util
import importlib
import os
import subprocess
import sys

import pytest

from worldline.errors import SimulatorError
from worldline.sim.headless import choose_backend, require_backend

linux = pytest.mark.skipif(sys.platform != "linux", reason="headless backends are chosen on Linux only")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
    return monkeypatch


@linux
@pytest.mark.parametrize(("installed", "chosen"), [({"OSMesa", "EGL"}, "osmesa"), ({"EGL"}, "egl"), (set(), "")])
def test_osmesa_first_then_egl(bare: pytest.MonkeyPatch, installed: set[str], chosen: str) -> None:
    bare.delitem(sys.modules, "mujoco", raising=False)
    bare.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so" if name in installed else None)
    choose_backend()
    assert os.environ["MUJOCO_GL"] == chosen


@linux
def test_a_set_backend_is_kept_and_a_missing_library_named(bare: pytest.MonkeyPatch) -> None:
    bare.delitem(sys.modules, "mujoco", raising=False)
    bare.setattr(ctypes.util, "find_library", lambda name: None)
    bare.setenv("MUJOCO_GL", "egl")
    with pytest.raises(SimulatorError, match="libegl1"):
        choose_backend()
    bare.setattr(ctypes.util, "find_library", lambda name: "there")
    choose_backend()
    assert os.environ["MUJOCO_GL"] == "egl"


@linux
def test_a_backend_that_mujoco_does_not_have(bare: pytest.MonkeyPatch) -> None:
    bare.delitem(sys.modules, "mujoco", raising=False)
    bare.setenv("MUJOCO_GL", "osmsea")
    with pytest.raises(SimulatorError, match=r"osmesa .* required, got 'osmsea'"):
        choose_backend()


@linux
def test_without_any_library_the_message_says_what_to_install(bare: pytest.MonkeyPatch) -> None:
    gl_context = importlib.import_module("mujoco.gl_context")
    bare.setattr(ctypes.util, "find_library", lambda name: None)
    bare.setattr(gl_context, "_MUJOCO_GL", "")
    with pytest.raises(SimulatorError, match="apt-get install libosmesa6"):
        require_backend()


@linux
@pytest.mark.skipif(ctypes.util.find_library("OSMesa") is None, reason="libOSMesa is not installed")
def test_a_fresh_process_renders_with_nothing_set() -> None:
    code = (
        "import sys, worldline.sim as s; assert 'mujoco' not in sys.modules\n"
        "w = s.make_world('metaworld/reach-v3', cameras=('corner2',), size=16, horizon=4)\n"
        "assert w.reset(0).images['corner2'].float().std() > 5"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
