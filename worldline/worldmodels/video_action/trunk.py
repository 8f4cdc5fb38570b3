"""The transformer over all tokens: full attention; each group of tokens (a frame, a block) is modulated by a vector of its own."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldline.worldmodels.layers import MLP, QKV
from worldline.worldmodels.video_action.config import TrunkConfig
from worldline.worldmodels.video_action.tokens import Sequence


class TrunkBlock(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        width = config.width
        self.qkv, self.out = QKV(width, config.heads), nn.Linear(width, width)
        self.mlp = MLP(width, config.mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, vector: Tensor, group: Tensor, mask: Tensor | None) -> Tensor:
        found = self.modulation(vector)[:, group]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = found.chunk(6, -1)
        q, k, v = (rearrange(z, "n l h d -> n h l d") for z in self.qkv(modulated(x, shift, scale)))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v, mask), "n h l d -> n l (h d)")
        x = torch.addcmul(x, gate, self.out(attended))
        return torch.addcmul(x, gate_mlp, self.mlp(modulated(x, shift_mlp, scale_mlp)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class Trunk(nn.Module):
    """Tokens "n l d" to tokens "n l d". Those that are not `there` are looked at by none."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TrunkBlock(config) for _ in range(config.depth))
        self.final = nn.Linear(config.width, 2 * config.width)

    def forward(self, sequence: Sequence, vector: Tensor) -> Tensor:
        """vector: "n d", what conditions all of a row."""
        mask = None if sequence.there is None else sequence.there[:, None, None]
        told = F.silu(vector[:, None] + sequence.told)
        tokens = sequence.tokens
        for block in self.blocks:
            tokens = block(tokens, told, sequence.group, mask)
        shift, scale = self.final(told)[:, sequence.group].chunk(2, -1)
        return modulated(tokens, shift, scale)

    def init_weights(self) -> None:
        """Gates start at 1, as in `SpaceTimeTransformer`: blocks work from the first step."""
        for block in self.blocks:
            assert isinstance(block, TrunkBlock)
            width = block.out.out_features
            for gate in (2, 5):
                nn.init.ones_(block.modulation.bias[gate * width : (gate + 1) * width])


def init_linear(module: nn.Module) -> None:
    """Every linear layer in it: Xavier uniform, biases 0 (`SpaceTimeTransformer.init_weights` says why)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
