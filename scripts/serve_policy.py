"""Serve a policy over a websocket, so that it can be ranked from another environment.

    python scripts/serve_policy.py runs/bc50 --port 8765
    python scripts/serve_policy.py my_package.my_module:act --spec runs/world --port 8765
    worldline rank ... --policies ws://127.0.0.1:8765

A LeRobot or openpi policy is served from its own environment, without worldline: about ten lines around websockets,
msgpack and numpy. docs/remote_policy.md has them.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from worldline.checkpoint import from_json, read_json, resolve
from worldline.errors import WorldlineError
from worldline.policies import load_policy
from worldline.policies.serve import serve
from worldline.types import WorldSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePolicy:
    policy: Annotated[str, tyro.conf.Positional]
    """A checkpoint folder or module:function, with @noise=0.5,lag=4 behind it if it is to be made worse."""
    spec: Path | None = None
    """A checkpoint folder whose spec.json says what the world provides; a policy folder has its own."""
    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in. There is no password: keep it inside a network you trust."""
    port: int = 8765


def main(config: ServePolicy) -> None:
    folder = resolve(config.spec or config.policy.partition("@")[0])
    spec = from_json(WorldSpec, read_json(folder / "spec.json"), source=f"{folder}/spec.json")
    serve(load_policy(config.policy, spec=spec), config.host, config.port, name=config.policy)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(tyro.cli(ServePolicy, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except WorldlineError as error:
        sys.exit(f"error: {error}")
