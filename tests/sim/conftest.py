import os
import sys

import pytest

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "osmesa")
pytest.importorskip("metaworld", reason="needs the extra worldline[metaworld]")
