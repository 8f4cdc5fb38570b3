"""Frame by frame through the network with a key-value cache: denoise the next frame, then make it history.

All in the network's units (whitened latents, normalised poses and blocks). A frame costs one pass a solver step (two with
guidance); the first of them takes the frame before along and writes it to the cache, unless the solver's last step has served as
that (`cache_write`). The cost does not depend on how many frames there were. A frame's memories are looked up and encoded once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldline.diffusion import add_noise, linear_path, row_noise, sample_euler, solver_levels
from worldline.diffusion.samplers import Predict
from worldline.worldmodels.config import AutoregressiveConfig
from worldline.worldmodels.doubled_pass import NetworkClip
from worldline.worldmodels.guesses import motion_of
from worldline.worldmodels.memory import MemoryBank, frame_content, recall
from worldline.worldmodels.ports import FrameBatch
from worldline.worldmodels.state import StreamState
from worldline.worldmodels.transformer import ReadMemory, SpaceTimeTransformer

_HISTORY_DRAW = 1_000  # noise of the history level must differ from that of every solver step


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame of n rows. Cameras that a row does not see are zeros."""

    latents: Mapping[str, Tensor]  # camera -> "n c h w"
    pose: Tensor  # "n p"
    seen: Mapping[str, Tensor]  # camera -> "n" bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """The network of one embodiment, and how it is sampled."""

    network: SpaceTimeTransformer
    body: str
    config: AutoregressiveConfig

    def start(self, clip: NetworkClip) -> StreamState:
        """A state of n rows that hold no frame yet. Of `clip` only sizes and instructions are taken."""
        config, port = self.config.network, self.network.port(self.body)
        n, p = len(clip.poses), clip.poses.shape[2]
        device = clip.poses.device
        blank = {camera: torch.zeros_like(z[:, 0]) for camera, z in clip.frames.items()}
        unseen = {camera: torch.zeros(n, dtype=torch.bool, device=device) for camera in blank}
        heads, head_width = port.tokens_per_frame * config.heads, config.width // config.heads
        return StreamState(
            cache=torch.zeros(n, config.depth, 2, heads, config.window, head_width, device=device),
            frames=torch.zeros(n, dtype=torch.long, device=device),
            latents=blank,
            seen=unseen,
            pose=torch.zeros(n, p, device=device),
            motion=torch.zeros(n, 2 * p + port.body.action_dim, device=device),
            aim=self._aim_at_rest(torch.zeros(n, p, device=device)),
            text=torch.zeros(n, 0, device=device) if clip.text is None else clip.text,
            bank=MemoryBank.empty(
                n, config.memory.capacity, p, frame_content(blank, unseen, torch.zeros(n, device=device))
            )
            if config.memory.size
            else None,
            unwritten=None,
        )

    def next(
        self,
        state: StreamState,
        action: Tensor | None,
        seeds: Tensor,
        *,
        solve: Callable[[Predict, Tensor], Tensor] | None = None,
    ) -> tuple[StreamState, Frame]:
        """Imagine the frame that `action` "n k*a" leads to (None: whatever follows), and make it history. Writes into the state's
        cache. `solve`: what goes from noise to the frame in place of Euler's steps."""
        frame, asked = self._denoise(state, action, seeds, solve)
        state = replace(state, unwritten=None)  # it has been written on the way
        written = asked if self.config.cache_write == "last-step" else None
        return self.append(state, frame, action, seeds, written=written), frame

    def write(self, state: StreamState) -> StreamState:
        """The state with its last frame in the cache, which is written in place."""
        if state.unwritten is not None:
            slot, visible = state.visible(state.unwritten.time)
            self.network.stream(self.body, state.unwritten, state.cache, slot, visible, None, self.config.router)
        return replace(state, unwritten=None)

    def append(
        self, state: StreamState, frame: Frame, action: Tensor | None, seeds: Tensor, *, written: Frame | None = None
    ) -> StreamState:
        """Make a finished frame history: at the history level, unless the cache holds it already, as `written`."""
        state = self.write(state)
        before = torch.where(state.frames[:, None] > 0, state.motion[:, : frame.pose.shape[1]], frame.pose)
        held, at, unwritten = written, solver_levels(self.config.solver_steps)[-2].item(), None
        if held is None:
            held, at = self._as_history(state, frame, seeds), self.config.history_level
            level = torch.full((len(state),), at, device=frame.pose.device)
            unwritten = self._batch(state, held, level, action)
        bank = state.bank
        if bank is not None:
            kept = state.frames % self.config.network.memory.every == 0
            content = frame_content(held.latents, held.seen, torch.full((len(state),), at, device=frame.pose.device))
            bank = bank.push(frame.pose, state.frames, content, kept)
        made = replace(
            state,
            unwritten=unwritten,
            frames=state.frames + 1,
            latents=held.latents,
            seen=held.seen,
            pose=held.pose,
            motion=motion_of(frame.pose, before, self._block(state, action)),
            aim=self._next_aim(state, frame, action),
            bank=bank,
        )
        # a dream that writes its own last steps leaves nothing unwritten, and its states are alike
        return self.write(made) if self.config.cache_write == "last-step" else made

    def step(
        self,
        state: StreamState,
        frame: Frame,
        level: Tensor,
        action: Tensor | None,
        *,
        memory: ReadMemory | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One frame at `level` "n" through the network: its clean latents and pose. Its keys and values, and those of the frame
        before if that is unwritten, are written to the state's cache in place. Without `action` it is not told which it was.
        """
        batch = self._batch(state, frame, level, action)
        if state.unwritten is not None:
            batch = state.unwritten.then(batch)
        slot, visible = state.visible(batch.time)
        return self.network.stream(self.body, batch, state.cache, slot, visible, memory, self.config.router)

    def read_memory(self, state: StreamState, action: Tensor | None) -> ReadMemory | None:
        """What is remembered for the next frame, as the network reads it. None without a memory."""
        if state.bank is None:
            return None
        last = Frame(latents=state.latents, pose=state.pose, seen=state.seen)
        query = self.network.port(self.body).foretell(self._batch(state, last, torch.zeros_like(state.frames), action))
        config = self.config.network
        found = recall(state.bank, query[:, 0], state.frames, config.memory, config.window)
        return self.network.read(self.body, found)

    def _denoise(
        self,
        state: StreamState,
        action: Tensor | None,
        seeds: Tensor,
        solve: Callable[[Predict, Tensor], Tensor] | None = None,
    ) -> tuple[Frame, Frame]:
        """The next frame, and the noisy one that the solver last asked about, which the cache holds."""
        shapes = {camera: z.shape[1:] for camera, z in state.latents.items()} | {"": state.pose.shape[1:]}
        noise = [row_noise(seeds, state.frames, 0, tuple(s), stream=i) for i, s in enumerate(shapes.values())]
        sizes = [z[0].numel() for z in noise]
        seen = {camera: torch.ones_like(there) for camera, there in state.seen.items()}
        memory, asked = self.read_memory(state, action), []

        def unpack(x: Tensor) -> Frame:
            parts = [part.reshape(len(x), *s) for part, s in zip(x.split(sizes, 1), shapes.values())]
            return Frame(latents=dict(zip(state.latents, parts)), pose=parts[-1], seen=seen)

        def ask(x: Tensor, level: Tensor, action: Tensor | None) -> Tensor:
            nonlocal state
            clean, pose = self.step(state, unpack(x), level, action, memory=memory)
            state = replace(state, unwritten=None)  # written once is enough
            return torch.cat([*(z.flatten(1) for z in clean.values()), pose], dim=1)

        def predict(x: Tensor, level: Tensor) -> Tensor:
            asked[:] = [x]
            if self.config.guidance == 1 or action is None:
                return ask(x, level, action)
            free = ask(x, level, None)  # first: the keys and values that stay are those of the other
            return torch.lerp(free, ask(x, level, action), self.config.guidance)

        start = torch.cat([z.flatten(1) for z in noise], dim=1)
        if solve is None:
            made = sample_euler(predict, start, solver_levels(self.config.solver_steps), linear_path)
        else:
            made = solve(predict, start)
        return unpack(made), unpack(asked[0])

    def _aim_at_rest(self, pose: Tensor) -> Tensor:
        guess = self.network.port(self.body).guess_pose
        return pose[:, :0] if guess is None else guess.start(pose)

    def _next_aim(self, state: StreamState, frame: Frame, action: Tensor | None) -> Tensor:
        """To where commands have added up by the frame that `action` led to; a row's first frame is taken to be at rest, and so is
        one whose action is not known."""
        guess, rest = self.network.port(self.body).guess_pose, self._aim_at_rest(frame.pose)
        return (
            rest
            if guess is None or action is None
            else torch.where(state.frames[:, None] > 0, guess.aim(state.aim, action), rest)
        )

    def _as_history(self, state: StreamState, frame: Frame, seeds: Tensor) -> Frame:
        """The frame at the history level. Cameras that are not seen stay zeros."""
        if not self.config.history_level:
            return frame
        level = torch.full((len(state),), self.config.history_level, device=frame.pose.device)

        def noised(clean: Tensor, stream: int) -> Tensor:
            noise = row_noise(seeds, state.frames, _HISTORY_DRAW, tuple(clean.shape[1:]), stream=stream)
            return add_noise(linear_path, clean, noise, level)

        latents = {
            c: noised(z, i) * frame.seen[c][:, None, None, None] for i, (c, z) in enumerate(frame.latents.items())
        }
        return Frame(latents=latents, pose=noised(frame.pose, len(latents)), seen=frame.seen)

    def _block(self, state: StreamState, action: Tensor | None) -> Tensor:
        """The block "n k*a"; zeros, which nothing looks at, where it is not known."""
        width = self.network.port(self.body).body.action_dim
        return state.pose.new_zeros(len(state), width) if action is None else action

    def _batch(self, state: StreamState, frame: Frame, level: Tensor, action: Tensor | None) -> FrameBatch:
        return FrameBatch(
            latents={camera: z[:, None] for camera, z in frame.latents.items()},
            previous={camera: z[:, None] for camera, z in state.latents.items()},
            pose=frame.pose[:, None],
            previous_pose=state.pose[:, None],
            motion=state.motion[:, None],
            aim=state.aim[:, None] if state.aim.shape[1] else None,
            level=level[:, None],
            action=self._block(state, action)[:, None],
            has_action=(state.frames > 0)[:, None] & (action is not None),
            time=state.frames[:, None],
            seen={camera: there[:, None] for camera, there in frame.seen.items()},
            previous_seen={camera: there[:, None] for camera, there in state.seen.items()},
            text=state.text if state.text.shape[1] else None,
        )
