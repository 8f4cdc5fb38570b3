"""Low-rank adapters (LoRA 2106.09685, by peft) on the matrices of a world model's transformer blocks; all else stays as it is.

Post-training then keeps few numbers of optimiser state, and can move the model only so far. What is published has plain weights: the adapters
are added to the matrices they sit on.
"""

import copy
from typing import Any

import torch
from torch import nn

from worldline.errors import WorldlineError

SCALE = 2
"""Of an adapter's product: alpha over rank, as in Flow-GRPO (2505.05470)."""


def add_adapters(model: Any, rank: int, *, seed: int = 0) -> list[nn.Parameter]:
    """Put adapters into `model` in place, which then says what it said before; returns their weights, the only ones to be trained.

    Args:
        model: a world model with `hidden_matrices()`.

    Raises `WorldlineError` without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise WorldlineError("adapters of low rank require peft: pip install 'worldline[lora]'") from error
    matrices = {id(p) for p in model.hidden_matrices()}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in matrices]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names), model)
    return [p for p in model.parameters() if p.requires_grad]


def merged(model: Any) -> Any:
    """A copy with plain matrices that says the same."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, module.get_base_layer())
    return plain
