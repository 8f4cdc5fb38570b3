"""What the loops of reinforcement learning keep so that a killed run goes on bit for bit: weights, optimisers and history in one file.

One file, written atomically: a kill between two writes cannot mix two iterations.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from worldline.checkpoint import read_tensors, write_tensors

log = logging.getLogger(__name__)


class IterationState:
    """Modules and optimisers by name, and two lists of JSON-like rows: of iterations and of checks. Names that hold None are left out."""

    def __init__(
        self,
        path: Path,
        *,
        modules: Mapping[str, nn.Module | None],
        optimizers: Mapping[str, torch.optim.Optimizer | None],
    ) -> None:
        self.path = path
        self.modules = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        self.optimizers = {name: optimizer for name, optimizer in optimizers.items() if optimizer is not None}

    def store(self, iteration: int, history: list[dict[str, float]], checks: list[dict[str, float]]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{k}": v for k, v in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{index}/{k}": torch.as_tensor(v) for k, v in values.items()}
        told = json.dumps({"iteration": iteration, "history": history, "checks": checks}).encode()
        write_tensors(self.path, {**tensors, "told": torch.frombuffer(bytearray(told), dtype=torch.uint8)})

    def restore(self) -> tuple[int, list[dict[str, float]], list[dict[str, float]]]:
        """Fill modules and optimisers; the iteration reached, and both lists. Nothing stored: the beginning."""
        if not self.path.is_file():
            return 0, [], []
        tensors = read_tensors(self.path)
        for name, module in self.modules.items():
            head = f"{name}/"
            module.load_state_dict({k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)})
        for name, optimizer in self.optimizers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{name}/"):
                    _, _, index, slot = key.split("/")
                    slots.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        told = json.loads(bytes(tensors["told"].tolist()))
        log.info("going on with %s at iteration %d", self.path.parent, told["iteration"])
        return told["iteration"], told["history"], told["checks"]
