#!/usr/bin/env bash
# Sets worldline up on a fresh machine: a virtual environment in .venv, the tested versions, a headless GL library.
# Needs Python >= 3.11 (with venv) and a package manager. Safe to run again: what is there is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "setup: Python 3.11 or newer is required; none was found. Set PYTHON=/path/to/python." >&2; exit 2; }

stamp=.venv/worldline-setup
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
if [ ! -x .venv/bin/python ]; then
  echo "setup: making .venv with $($python --version)"
  "$python" -m venv .venv
fi
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "setup: installing (about 2.5 GB on disk; a few minutes the first time)"
  # torch first and by its exact pin: other packages' ranges would take a CUDA build
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[metaworld,sb3,offline,lora,dev]'
  echo "$wanted" > "$stamp"
fi

# Rendering without a screen needs OSMesa (software) or EGL.
if ! .venv/bin/python - <<'PY'
import ctypes.util, sys
sys.exit(0 if ctypes.util.find_library("OSMesa") or ctypes.util.find_library("EGL") else 1)
PY
then
  run=""
  [ "$(id -u)" = 0 ] || run="sudo"
  if command -v apt-get >/dev/null; then
    echo "setup: installing libosmesa6 (headless rendering)"
    $run apt-get update -qq && $run apt-get install -y -qq libosmesa6 >/dev/null
  elif command -v dnf >/dev/null; then
    $run dnf install -y -q mesa-libOSMesa
  elif command -v conda >/dev/null; then
    conda install -y -q -c conda-forge mesalib
  else
    echo "setup: a headless GL library is missing; install OSMesa (libosmesa6) or Mesa's EGL with your package manager" >&2
    exit 2
  fi
fi
