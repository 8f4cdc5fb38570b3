"""Chooses MuJoCo's GL backend before MuJoCo is imported, which is the only time it can be chosen.

With `MUJOCO_GL` set or a display present nothing is touched. Otherwise: OSMesa (software, works everywhere) if its
library is installed, else EGL (a GPU's or Mesa's). MuJoCo itself would pick GLFW, which fails without a display, and only
when the first picture is drawn.
"""

import ctypes.util
import logging
import os
import sys

from worldline.errors import SimulatorError

log = logging.getLogger(__name__)

INSTALL = "Install one: `apt-get install libosmesa6` (software) or `apt-get install libegl1 libegl-mesa0` (Mesa's EGL)."
_LIBRARY = {"osmesa": "OSMesa", "egl": "EGL"}
_SWITCHES = ("enable", "enabled", "on", "true", "1", "disable", "disabled", "off", "false", "0")
_BACKENDS = ("", "glfw", "glx", *_LIBRARY, *_SWITCHES)  # importing mujoco fails with any other value


def choose_backend() -> None:
    """Set `MUJOCO_GL` if nobody has, there is no display, and a headless library is installed.

    Raises:
        SimulatorError: `MUJOCO_GL` names no backend of MuJoCo's, or a library that this machine does not have.
    """
    if sys.platform != "linux" or "mujoco" in sys.modules:
        return
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    if chosen not in _BACKENDS:
        raise SimulatorError(
            f"MUJOCO_GL: osmesa (software), egl (GPU) or glfw (with a display) required, got {chosen!r}. "
            "Unset it to have one chosen."
        )
    if chosen in _LIBRARY and ctypes.util.find_library(_LIBRARY[chosen]) is None:
        raise SimulatorError(f"MUJOCO_GL={chosen} needs lib{_LIBRARY[chosen]}, which was not found. {INSTALL}")
    if chosen or _display():
        return
    for backend, library in _LIBRARY.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            log.info("MUJOCO_GL was not set and there is no display: using %s", backend)
            return


def require_backend() -> None:
    """Raise `SimulatorError` unless MuJoCo, already imported, can draw on this machine."""
    if sys.platform != "linux" or _display():
        return
    from mujoco import gl_context

    active = gl_context._MUJOCO_GL  # what MuJoCo read when it was imported
    if active in _LIBRARY:
        return
    found = [backend for backend, library in _LIBRARY.items() if ctypes.util.find_library(library)]
    if not found:
        raise SimulatorError(f"rendering needs a display or a headless GL library, and neither was found. {INSTALL}")
    raise SimulatorError(
        f"mujoco was imported with MUJOCO_GL={active!r}, which cannot draw without a display. "
        f"Set MUJOCO_GL={found[0]} in the environment, or make the world before anything else imports mujoco."
    )


def _display() -> bool:
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
