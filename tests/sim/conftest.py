"""Simulators are drawn without a screen, by whichever library this machine has."""

import pytest

from worldline.sim.headless import choose_backend

choose_backend()  # before the line below imports MuJoCo
pytest.importorskip("metaworld", reason="needs the extra worldline[metaworld]")
