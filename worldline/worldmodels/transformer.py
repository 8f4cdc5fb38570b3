"""A block-causal space-time transformer over tokenised multi-view frames, with one noise level a frame.

- Factorised attention: over all tokens of a frame (every camera's patches and one pose token, jointly), then over time
  at each token position; one MLP after the pair.
- Time attention takes any (query frame, key frame) mask, so one network serves the banded causal pass, the doubled pass
  of training (clean history beside noisy targets) and streaming with a cache.
- Level, action block and instruction reach every block through adaptive normalisation, computed once a frame (DiT,
  2212.09748), or the action by another adapter (`adapters`).
- The action is embedded by the robot's own port, or by experts that all robots share (`experts`).
- Every second block also reads frames of long ago, where there is a memory (`memory`).
- Dense networks (`guesses`) foretell the pose from the arm's motion and each view from the other views; their guesses are
  inputs: where the arm will be, and what comes into one camera's sight that has long been in another's.
- It predicts the change from the previous frame: with zero-initialised outputs an untrained network is exactly the
  copy-last-frame predictor.

What depends on a robot's cameras, poses and actions is in its `Port`; the network knows nothing of noise schedules, tokenizers
or normalisation.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldline.worldmodels.adapters import ADAPTERS, ActionAdapter, Conditioning, make_adapter
from worldline.worldmodels.experts import ActionExperts, Routing
from worldline.worldmodels.guesses import Guesses
from worldline.worldmodels.layers import MLP, QKV, LevelEmbedding, modulate, rotary, rotate
from worldline.worldmodels.memory import Memories, MemoryConfig
from worldline.worldmodels.memory_reading import MemoryReader, MemoryTokens
from worldline.worldmodels.ports import Body, FrameBatch, Port


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Sizes of the network. `window` counts frames, the current one included."""

    width: int = 192  # numbers of a token
    depth: int = 6  # blocks of (space attention, time attention, MLP)
    heads: int = 6  # of attention; width is heads times an even number
    window: int = 8  # frames that it sees, the current one included
    patch: int = 2  # latent cells along one side of a token
    mlp_ratio: float = 4.0  # width of the MLPs, in widths of a token
    guess_width: int = 256  # of the dense networks that guess the pose, and each view from the others; 0: none
    aim: bool = True  # the guessed pose knows to where commands have added up, where they say how far to go
    actions: bool = True  # False: the action-free predictor, a baseline that every world model must beat
    adapter: str = "adaln"  # how actions enter the blocks: adaln, additive or cross-attention
    cross_view: bool = True  # False: a camera's tokens see that camera alone
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    experts: int = 0  # networks shared by all embodiments that embed actions; 0: each embodiment has one of its own
    top_k: int = 2  # experts mixed for a frame

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width must be heads times an even number, got width={self.width}, heads={self.heads}")
        if min(self.width, self.depth, self.window, self.patch) < 1 or self.guess_width < 0:
            raise ValueError(f"width, depth, window and patch must be at least 1, guess_width at least 0, got {self}")
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter: one of {', '.join(ADAPTERS)} required, got {self.adapter!r}")
        if self.experts < 0 or (self.experts and not 1 <= self.top_k <= self.experts):
            raise ValueError(
                f"experts of at least 0 and top_k from 1 to experts required, got experts={self.experts}, top_k={self.top_k}"
            )
        if self.experts and not self.actions:
            raise ValueError("experts embed actions: actions=True required with experts, got actions=False")
        if self.memory.size and self.depth < 2:
            raise ValueError(
                f"a memory is read by every second block: a depth of at least 2 required, got {self.depth}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the network makes of l frames."""

    latents: Mapping[str, Tensor]  # camera -> "b l c h w"
    pose: Tensor  # "b l p"
    guesses: Guesses  # what it was helped by
    routing: Routing | None  # None without experts
    remembered: MemoryTokens | None  # None without memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadMemory:
    """Remembered frames, ready to be read: made once a frame, whatever the number of solver steps."""

    keys: list[tuple[Tensor, Tensor]]  # keys and values for each block that reads memory
    found: MemoryTokens


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, *, memory: bool) -> None:
        super().__init__()
        width = config.width
        self.space, self.time = QKV(width, config.heads), QKV(width, config.heads)
        self.space_out, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = MLP(width, config.mlp_ratio)
        self.modulation = nn.Linear(width, 9 * width)
        self.adapter: ActionAdapter = make_adapter(config.adapter, width, config.heads)
        self.memory = MemoryReader(width, config.heads) if memory else None

    def space_attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b = len(x)
        q, k, v = self.space(x)
        q, k, v = (rearrange(z, "b l s h d -> (b l) h s d") for z in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return self.space_out(rearrange(attended, "(b l) h s d -> b l s (h d)", b=b))

    def time_qkv(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values "b (s h) l d", queries and keys turned to their time."""
        q, k, v = (rearrange(z, "b l s h d -> b (s h) l d") for z in self.time(x))
        return rotate(q, turn), rotate(k, turn), v

    def time_output(self, attended: Tensor) -> Tensor:
        return self.time_out(rearrange(attended, "b (s h) l d -> b l s (h d)", h=self.time.heads))

    def forward(
        self,
        x: Tensor,
        condition: Conditioning,
        time_attention: Callable[[Tensor, "Block"], Tensor],
        views: Tensor | None,
        read: Callable[[Tensor, MemoryReader], Tensor] | None,
    ) -> Tensor:
        m = self.modulation(condition.vector).chunk(9, dim=-1)
        y = self.adapter.before_attention(modulate(x, m[0], m[1]), condition)
        x = torch.addcmul(x, m[2][:, :, None], self.space_attention(y, views))
        x = self.adapter.residual(x, condition)
        x = torch.addcmul(x, m[5][:, :, None], time_attention(modulate(x, m[3], m[4]), self))
        if read is not None and self.memory is not None:
            x = read(x, self.memory)
        return torch.addcmul(x, m[8][:, :, None], self.mlp(modulate(x, m[6], m[7])))


class SpaceTimeTransformer(nn.Module):
    """Predicts the clean latents and pose of each frame.

    Args:
        bodies: embodiment -> the sizes of its data.
        text_dim: length of an instruction's embedding; 0 for a network that is not told the instruction.
    """

    def __init__(self, config: TransformerConfig, bodies: Mapping[str, Body], *, text_dim: int = 0) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.ports = nn.ModuleDict(
            {
                port_key(name): Port(
                    body,
                    width=width,
                    patch=config.patch,
                    guess_width=config.guess_width,
                    actions=config.actions,
                    aim=config.aim,
                    cross_view=config.cross_view,
                    memory=config.memory,
                    experts=config.experts > 0,
                )
                for name, body in bodies.items()
            }
        )
        inputs = {name: self.port(name).move_dim for name in bodies}
        self.experts = (
            ActionExperts(inputs, width, experts=config.experts, top_k=config.top_k) if config.experts else None
        )
        self.embed_level = LevelEmbedding(width)
        self.embed_text = nn.Linear(text_dim, width) if text_dim else None
        remembers = config.memory.size > 0
        self.blocks = nn.ModuleList(Block(config, memory=remembers and i % 2 == 1) for i in range(config.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers: Xavier uniform, biases 0; token places: normal(0, 0.5); but for two things.

        Gates start at 1: blocks work from the first step. Output heads start at 0: the untrained network is
        copy-last-frame. (After 150 steps on the dot world the one-step error was .44 with normal(0, 0.02) and DiT's zero
        gates, .33 with gates at 1, .18 with Xavier as well: at these widths 0.02 starves the conditioning path.)
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for port in self.ports.values():
            cast(Port, port).init_weights()
        if self.experts is not None:
            self.experts.init_weights()
        for block in self._blocks():
            for gate in (2, 5, 8):  # of shift, scale, gate for space attention, time attention, MLP
                nn.init.ones_(block.modulation.bias[gate * self.config.width : (gate + 1) * self.config.width])

    def port(self, body: str) -> Port:
        return cast(Port, self.ports[port_key(body)])

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            yield cast(Block, block)  # a ModuleList says only that it holds modules

    def route(self, body: str, frames: FrameBatch, guesses: Guesses, router: str) -> tuple[Tensor, Routing]:
        """The frames' actions "b l d" as embedded by experts, and which."""
        assert self.experts is not None
        return self.experts(self.port(body).moves(frames, guesses), body, told=frames.has_action, router=router)

    def _begin(
        self, body: str, frames: FrameBatch, guesses: Guesses, router: str
    ) -> tuple[Tensor, Conditioning, Routing | None]:
        """Tokens and what conditions them."""
        embedded, routing = (None, None) if self.experts is None else self.route(body, frames, guesses, router)
        x, action, pose = self.port(body).tokenize(frames, guesses, embedded)
        vector = self.embed_level(frames.level)
        if next(self._blocks()).adapter.modulates:
            vector = vector + action
        if self.embed_text is not None:
            assert frames.text is not None
            vector = vector + self.embed_text(frames.text)[:, None]
        return x, Conditioning(vector=F.silu(vector), action=action, pose=pose), routing

    def read(self, body: str, memories: Memories) -> ReadMemory:
        """Remembered frames as keys and values of the blocks that read them."""
        found = self.port(body).remember(memories)
        keys = [block.memory.keys(found.tokens) for block in self._blocks() if block.memory is not None]
        return ReadMemory(keys=keys, found=found)

    def forward(
        self,
        body: str,
        frames: FrameBatch,
        mask: Tensor,
        keep: slice = slice(None),
        memories: Memories | None = None,
        *,
        router: str = "learned",
    ) -> Prediction:
        """All frames at once.

        Args:
            mask: "l l", True where a query frame (row) may look at a key frame (column).
            keep: the frames whose predictions are wanted: the last ones.
            memories: what is remembered for each of those. They alone read it.
            router: how experts are chosen, if there are some (`experts`).
        """
        port = self.port(body)
        guesses = port.guesses(frames)
        x, condition, routing = self._begin(body, frames, guesses, router)
        turn = _broadcast_turn(rotary(frames.time, self.config.width // self.config.heads))
        views = port.view_mask(x.device)
        guesses = guesses.keep(keep)
        memory = None if memories is None else self.read(body, memories)
        if memory is not None:
            x = _with_last(x, x[:, keep] + F.pad(memory.found.beside, (0, 0, 0, 1)))  # the pose token has none
        pending = iter([] if memory is None else memory.keys)

        def read(y: Tensor, reader: MemoryReader) -> Tensor:
            assert memory is not None
            return _with_last(y, reader(y[:, keep], next(pending), memory.found.readable))

        for block in self._blocks():
            x = block(x, condition, lambda y, b: _masked(b, y, turn, mask), views, None if memory is None else read)
        frames, condition = frames.keep(keep), condition.keep(keep)
        shift, scale = self.final_modulation(condition.vector).chunk(2, dim=-1)
        latents, pose = port.output(x[:, keep], shift, scale, frames, guesses.pose)
        routing = None if routing is None else routing.keep(keep)
        remembered = None if memory is None else memory.found
        return Prediction(latents=latents, pose=pose, guesses=guesses, routing=routing, remembered=remembered)

    def stream(
        self,
        body: str,
        frames: FrameBatch,
        cache: Tensor,
        slot: Tensor,
        visible: Tensor,
        memory: ReadMemory | None,
        router: str = "learned",
    ) -> tuple[dict[str, Tensor], Tensor]:
        """l frames that follow each other against cached keys and values, which they overwrite at their `slot`, in place.

        Returns the clean latents "n c h w" and pose "n p" of the last one: those before it are written, no more.

        Args:
            cache: "n depth 2 (s heads) window d".
            slot: "n l", the ring position of each frame.
            visible: "n l window", which ring positions each frame may attend to (its own included).
            memory: what `read` made of the frames remembered for the last one, which alone reads it.
            router: how experts are chosen, if there are some (`experts`).
        """
        port = self.port(body)
        guesses = port.guesses(frames)
        x, condition, _ = self._begin(body, frames, guesses, router)
        turn = _broadcast_turn(rotary(frames.time, self.config.width // self.config.heads))
        views = port.view_mask(x.device)
        rows, last = torch.arange(len(x), device=x.device), slice(x.shape[1] - 1, None)
        # as numbers to be added: made from booleans, they would be made again in every block
        hidden = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, float("-inf"))[:, :, None, None]
        if memory is not None:
            x = _with_last(x, x[:, last] + F.pad(memory.found.beside, (0, 0, 0, 1)))
        pending = iter([] if memory is None else memory.keys)

        def read(y: Tensor, reader: MemoryReader) -> Tensor:
            assert memory is not None
            return _with_last(y, reader(y[:, last], next(pending), memory.found.readable))

        for i, block in enumerate(self._blocks()):

            def attend(y: Tensor, block: Block, layer: Tensor = cache[:, i]) -> Tensor:
                q, k, v = block.time_qkv(y, turn)
                attended = []
                for j in range(q.shape[2]):  # the next one takes the place of the oldest that this one sees
                    layer[rows, 0, :, slot[:, j]], layer[rows, 1, :, slot[:, j]] = k[:, :, j], v[:, :, j]
                    one = F.scaled_dot_product_attention(q[:, :, j : j + 1], layer[:, 0], layer[:, 1], hidden[:, j])
                    attended.append(one)
                return block.time_output(torch.cat(attended, dim=2) if len(attended) > 1 else attended[0])

            x = block(x, condition, attend, views, None if memory is None else read)
        frames, condition, guesses = frames.keep(last), condition.keep(last), guesses.keep(last)
        shift, scale = self.final_modulation(condition.vector).chunk(2, dim=-1)
        latents, pose = port.output(x[:, last], shift, scale, frames, guesses.pose)
        return {camera: z[:, 0] for camera, z in latents.items()}, pose[:, 0]


def port_key(body: str) -> str:
    """An embodiment's name as a module's: without dots."""
    return body.replace(".", "_")


def _with_last(x: Tensor, last: Tensor) -> Tensor:
    """ "b l s d" with its last frames replaced."""
    return torch.cat([x[:, : x.shape[1] - last.shape[1]], last], dim=1)


def _masked(block: Block, y: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    q, k, v = block.time_qkv(y, turn)
    return block.time_output(F.scaled_dot_product_attention(q, k, v, mask))


def _broadcast_turn(turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(l, d/2) or (b, l, d/2) to broadcast against "b (s h) l d/2"."""
    cos, sin = turn
    return (cos[:, None], sin[:, None]) if cos.ndim == 3 else (cos, sin)


def banded_causal_mask(frames: int, window: int, device: torch.device | None = None) -> Tensor:
    """True where key frame j is one of the last `window` frames up to query frame i: i - window < j <= i."""
    i = torch.arange(frames, device=device)
    return (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)


def teacher_forcing_mask(frames: int, window: int, device: torch.device | None = None) -> Tensor:
    """Mask of the doubled pass: `frames` history frames 0..T-1, then `frames` noisy targets 1..T.

    History frame i sees history as in the banded causal pass. Target i+1 sees itself and the window-1 history frames
    before it: exactly what streaming sees.
    """
    i = torch.arange(frames, device=device)
    history = banded_causal_mask(frames, window, device)
    past = (i[None] <= i[:, None]) & (i[None] > i[:, None] + 1 - window)  # target of row i is frame i+1
    return torch.cat(
        [
            torch.cat([history, torch.zeros_like(history)], dim=1),
            torch.cat([past, torch.eye(frames, dtype=torch.bool, device=device)], dim=1),
        ]
    )
