"""What makes a short training go further: the optimisers of a run, and whether its network is compiled."""

import logging
import shutil
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from worldline.errors import SpecMismatch

if TYPE_CHECKING:
    from worldline.trainers.loop import LoopConfig

log = logging.getLogger(__name__)
_WORTH_COMPILING = 2000  # steps; compiling takes a minute or two of one core


@runtime_checkable
class FastTraining(Protocol):
    """A model that says what Muon and torch.compile may take of it.

    Its submodule `network` is the part whose `forward` is worth compiling; every training step calls it with the same shapes. It is no
    member of this protocol, because from Python 3.12 on `isinstance` does not see a module's submodules.
    """

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Weights that map one hidden vector to another: no embeddings, no output heads."""
        ...


def build_optimizers(model: nn.Module, config: "LoopConfig") -> list[torch.optim.Optimizer]:
    """AdamW, or Muon and AdamW. Weight decay for matrices and kernels only.

    Muon (Jordan et al. 2024, torch.optim.Muon) takes orthogonalised steps in the hidden matrices. Its updates are scaled
    to the size of AdamW's (2502.16982). Raises `SpecMismatch` if the model does not name its matrices.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden: list[nn.Parameter] = []
    if config.optimizer == "muon":
        if not isinstance(model, FastTraining):
            raise SpecMismatch(
                f"--loop.optimizer muon requires a world model, whose matrices it knows (hidden_matrices), got {type(model).__name__}: use adamw"
            )
        hidden = [p for p in model.hidden_matrices() if p.requires_grad]
    taken = {id(p) for p in hidden}
    rest = [p for p in trained if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))]
    if hidden:
        muon = torch.optim.Muon(
            hidden, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def should_compile(config: "LoopConfig", device: str) -> bool:
    """Whether this run's network is compiled. On CPUs that needs a C++ compiler, which small machines lack."""
    if config.compile != "auto":
        return config.compile == "yes"
    able = device == "cuda" or any(shutil.which(name) for name in ("g++", "clang++"))
    return able and config.steps >= _WORTH_COMPILING


def compile_network(model: nn.Module) -> None:
    """Compile in place: names and weights stay as they are. Models that name no network are left alone, and networks that are not called as
    one (unified video-action models: what is asked differs from row to row, and shapes with it)."""
    if not isinstance(model, FastTraining):
        return
    network = model.get_submodule("network")
    if type(network).forward is nn.Module.forward:
        log.info("not compiled: the shapes of this network's passes change from step to step")
        return
    log.info("compiling the network: the first step takes a minute or two (--loop.compile no leaves it out)")
    network.compile(dynamic=False)
