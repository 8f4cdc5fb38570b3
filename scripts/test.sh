#!/usr/bin/env bash
# Sets everything up on a fresh machine, then runs all checks and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
ruff format --check .
ruff check .
pyright
pytest -n 2 --dist loadfile "$@"
