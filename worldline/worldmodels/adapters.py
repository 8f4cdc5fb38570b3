"""How an action enters the blocks of a network: three published ways behind one interface.

- `adaln`: the action is added to the level's embedding and modulates every block (DiT, 2212.09748).
- `additive`: a projection of its own in each block adds the action to the modulated input of attention (the ACT-Adapter of
  Astra, 2512.08931); modulation carries the level alone.
- `cross-attention`: the tokens of a frame attend to the frame's own action and pose (frame-level conditioning of
  Ctrl-World, 2510.10125); modulation carries the level alone.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

AdapterKind = Literal["adaln", "additive", "cross-attention"]
ADAPTERS: tuple[str, ...] = get_args(AdapterKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What conditions each frame. `vector` modulates (normalised, shifted, scaled, gated) every block."""

    vector: Tensor  # "b l d", after its activation
    action: Tensor  # "b l d"
    pose: Tensor  # "b l d"

    def keep(self, frames: slice) -> "Conditioning":
        return Conditioning(vector=self.vector[:, frames], action=self.action[:, frames], pose=self.pose[:, frames])


class ActionAdapter(nn.Module):
    """One block's way to its action. The base class leaves it to modulation (`adaln`)."""

    modulates = True  # whether the action is part of `Conditioning.vector`

    def before_attention(self, y: Tensor, condition: Conditioning) -> Tensor:
        """Tokens "b l s d" that are about to enter space attention, normalised and modulated."""
        return y

    def residual(self, x: Tensor, condition: Conditioning) -> Tensor:
        """The token stream "b l s d" itself, after space attention."""
        return x


class AdditiveAdapter(ActionAdapter):
    modulates = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def before_attention(self, y: Tensor, condition: Conditioning) -> Tensor:
        return y + self.project(condition.action)[:, :, None]


class CrossAttentionAdapter(ActionAdapter):
    modulates = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def residual(self, x: Tensor, condition: Conditioning) -> Tensor:
        context = torch.stack([condition.action, condition.pose], dim=2)
        q = rearrange(self.query(F.layer_norm(x, x.shape[-1:])), "b l s (h d) -> b l h s d", h=self.heads)
        k, v = rearrange(self.key_value(context), "b l s (two h d) -> two b l h s d", two=2, h=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b l h s d -> b l s (h d)"))


def make_adapter(kind: str, width: int, heads: int) -> ActionAdapter:
    match kind:
        case "adaln":
            return ActionAdapter()
        case "additive":
            return AdditiveAdapter(width)
        case "cross-attention":
            return CrossAttentionAdapter(width, heads)
    raise ValueError(f"adapter: one of {', '.join(ADAPTERS)} required, got {kind!r}")
