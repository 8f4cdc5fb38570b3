"""The architecture on one page: what travels between the stages, and what each stage promises.

    record ──> Episode ──> Clip ──VideoTokenizer──> latents ──WorldModel──> imagined latents ──decode──> Observation
                                                        ^                                                    │
                                                        └───────── action blocks <── executor <── Policy <───┤
                                                                                                  Scorer <───┘

Axes, everywhere: b batch · t frames · c channels · h w height, width · k control steps per frame · m actions in a
policy's chunk · f latent frames per call · a action dims · p pose dims · n parallel environments.

Time alignment, stated once::

    frame      0           1           2                 frames  "b t c h w",  poses "b t p"
               |-----------|-----------|
    block      actions[:,0]  actions[:,1]                actions "b t-1 k a"

`actions[:, i]` takes frame i to frame i+1: the k control actions sent between them, in order, in physical units, as the environment consumed them (clipped).

Everything here is a frozen dataclass or a Protocol. Images are uint8 in [0, 255]; latents are raw (un-whitened) float; noise levels are floats
in [0, 1], 0 = clean data, 1 = pure noise. *Absent* is never a level: it is a separate mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from worldline.errors import SpecMismatch

# --- Specs: saved with every model, compared wherever two components meet ---------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraSpec:
    """A camera's name and the size (pixels) of its frames."""

    name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpec:
    """What an action means. Two specs that differ in any field are not interchangeable without an `ActionMap`."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    kind: Literal["absolute", "delta", "velocity"]
    space: Literal["joint", "cartesian", "mixed"]
    rate_hz: float  # control rate: k actions of one block are 1/rate_hz apart
    source: Literal["commanded", "achieved"]
    embodiment: str

    @property
    def dim(self) -> int:
        return len(self.names)

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.low) == len(self.high):
            raise SpecMismatch(
                f"ActionSpec: names, low and high must have one entry a dimension, "
                f"got {len(self.names)}, {len(self.low)}, {len(self.high)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Shape and statistics of a tokenizer's raw latents. `mean` and `std` (per camera, per channel) whiten them."""

    fingerprint: str
    shapes: Mapping[str, tuple[int, int, int]]  # camera -> (c, h, w)
    mean: Mapping[str, tuple[float, ...]]
    std: Mapping[str, tuple[float, ...]]
    frames_per_latent: int = 1  # r: one latent frame is r video frames (the first is always one), and takes r*k actions


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSpec:
    """What a dataset, world model, policy or scorer is about. `fps` counts frames, `action.rate_hz` control steps."""

    cameras: tuple[CameraSpec, ...]
    fps: float
    control_steps: int  # k
    action: ActionSpec
    pose_names: tuple[str, ...] = ()
    latent: LatentSpec | None = None
    chunk: int = 1  # latent frames one `imagine` call makes at a time

    def camera(self, name: str) -> CameraSpec:
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise SpecMismatch(f"camera required: {name!r}; got cameras {[c.name for c in self.cameras]}")


def require_match(
    provided: WorldSpec,
    required: WorldSpec,
    *,
    between: str,
    only: Sequence[str] = ("cameras", "control_steps", "action", "pose_names"),
) -> None:
    """Raise `SpecMismatch` listing every differing field of `only`. Cameras may be more than those required."""
    lines: list[str] = []
    for name in only:
        want, got = getattr(required, name), getattr(provided, name)
        if name == "cameras":
            have = {c.name: c for c in got}
            lines += [
                f"  camera {c.name}: required {c.height}x{c.width}, got {_size(have.get(c.name))}"
                for c in want
                if have.get(c.name) != c
            ]
        elif name == "action":
            lines += [
                f"  action.{f.name}: required {getattr(want, f.name)!r}, got {getattr(got, f.name)!r}"
                for f in fields(want)
                if getattr(want, f.name) != getattr(got, f.name)
            ]
        elif want != got:
            lines.append(f"  {name}: required {want!r}, got {got!r}")
    if lines:
        raise SpecMismatch(
            f"{between} do not fit:\n" + "\n".join(lines) + "\nUse components made for the same data and --stride."
        )


def _size(camera: CameraSpec | None) -> str:
    return "none" if camera is None else f"{camera.height}x{camera.width}"


# --- What travels -----------------------------------------------------------------------------------------------------


@runtime_checkable
class FrameSequence(Protocol):
    """Lazily decoded frames of one camera of one episode."""

    def __len__(self) -> int: ...

    def __getitem__(self, frames: slice) -> UInt8[Tensor, "t c h w"]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One recorded or imagined episode in physical units. `frames` may be empty (low-dimensional data)."""

    frames: Mapping[str, FrameSequence]  # camera -> lazily decoded uint8 frames
    poses: Float[Tensor, "t p"]
    actions: Float[Tensor, "t-1 k a"]
    states: Float[Tensor, "t s"]  # simulator or low-dimensional state; s may be 0
    rewards: Float[Tensor, " t-1"] | None  # None: never measured
    frame_success: Bool[Tensor, " t"] | None  # success held at any control step since the previous frame; None: unknown
    success: bool | None  # None unless a named scorer (a simulator's rule, a model, a person) produced it
    terminated: bool
    truncated: bool
    instruction: str
    spec: WorldSpec
    index: int
    provenance: Mapping[str, str] = field(default_factory=dict)  # policy, cause, seed, simulator or world model, scorer

    def __len__(self) -> int:
        return self.poses.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A batch of windows. `frames` holds uint8 pixels or raw float latents; a camera may be absent from some rows."""

    frames: Mapping[str, Shaped[Tensor, "b t c _h _w"]]
    poses: Float[Tensor, "b t p"]
    actions: Float[Tensor, "b t-1 k a"]  # k is frames_per_latent times the control steps where frames are latents
    present: Mapping[str, Bool[Tensor, " b"]] = field(default_factory=dict)  # cameras not named are present everywhere
    instruction: tuple[str, ...] = ()
    lead: int = 0  # the first so many frames are what came before: to be known, not for a loss
    led: Int[Tensor, " b"] | None = None  # how many of those are there, the last ones; the others are zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a policy or scorer sees: the same in simulator, dataset and dream."""

    images: Mapping[str, UInt8[Tensor, "n c _h _w"]]
    pose: Float[Tensor, "n p"]
    instruction: tuple[str, ...]

    def __len__(self) -> int:
        return self.pose.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imagination:
    """Frames a world model made: raw latents per camera and predicted poses in physical units."""

    latents: Mapping[str, Float[Tensor, "n f c _h _w"]]
    poses: Float[Tensor, "n f p"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A stochastic sampling path, kept so that its exact log-probability can be recomputed with gradients."""

    std: Float[Tensor, " s"]
    mean: Float[Tensor, "s n *x"]
    x: Float[Tensor, "s+1 n *x"]  # from noise to the sample, or to what a last step without density makes it of
    level: Float[Tensor, " s+1"]
    context: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A scorer's word on one frame: dense reward and probability that the task is done."""

    reward: Float[Tensor, " n"]
    success: Float[Tensor, " n"]


# --- What the stages promise ------------------------------------------------------------------------------------------


@runtime_checkable
class RowState(Protocol):
    """Opaque recurrent state of n rows. Never shared storage between two live states."""

    def __len__(self) -> int: ...

    def index(self, rows: Int[Tensor, " r"]) -> "RowState":
        """Fork: the rows named, in that order, repeats allowed."""
        ...

    def where(self, mask: Bool[Tensor, " n"], other: Any) -> "RowState":
        """Row i of `other` where mask[i], of self elsewhere: reset by row."""
        ...


@runtime_checkable
class VideoTokenizer(Protocol):
    """Frames to raw latents and back. The latent cache stores raw latents under `latent_spec.fingerprint`."""

    @property
    def latent_spec(self) -> LatentSpec: ...

    def encode(
        self, frames: Mapping[str, UInt8[Tensor, "b t c _h _w"]]
    ) -> Mapping[str, Float[Tensor, "b f c2 _h _w"]]: ...

    def decode(
        self, latents: Mapping[str, Float[Tensor, "b f c2 _h _w"]]
    ) -> Mapping[str, UInt8[Tensor, "b t c _h _w"]]: ...


@runtime_checkable
class StreamingTokenizer(VideoTokenizer, Protocol):
    """A tokenizer that compresses time: decoding latent i of a stream needs what came before it."""

    def start(self, n: int) -> RowState: ...

    def decode_next(
        self, state: Any, latents: Mapping[str, Float[Tensor, "n f c _h _w"]]
    ) -> tuple[RowState, Mapping[str, UInt8[Tensor, "n t c2 _h _w"]]]:
        """The r frames (one for the first) of each latent that follows."""
        ...


@runtime_checkable
class WorldModel(Protocol):
    """Imagines the frames that actions lead to. Noise is a function of (row seed, frame, solver step) alone."""

    @property
    def spec(self) -> WorldSpec: ...

    def observe(self, clip: Clip) -> RowState:
        """Take in real frames (raw latents) and the blocks between them; one frame is enough."""
        ...

    def imagine(
        self, state: Any, actions: Float[Tensor, "n f k a"] | None, *, seeds: Int[Tensor, " n"]
    ) -> tuple[RowState, Imagination]:
        """The f latent frames that follow; f a multiple of `spec.chunk`. Row i depends on row i alone. Without actions one chunk,
        whatever may follow; `SpecMismatch` if the model has not learned that."""
        ...


@runtime_checkable
class TracedWorldModel(WorldModel, Protocol):
    """Stochastic paths with exact log-probabilities, differentiated also through what the weights made of what was `seen`."""

    def require_traceable(self, steps: int) -> None: ...  # raises `SpecMismatch`
    def traced_chunk(self) -> int: ...  # frames that are denoised together: a dream is traced in whole chunks of them

    def sample_traced(
        self, seen: Clip, actions: Float[Tensor, "n f k a"], *, seeds: Int[Tensor, " n"], steps: int, eta: float
    ) -> Trace: ...

    def trace_means(self, trace: Trace) -> Float[Tensor, "s n *x"]: ...  # of each step, by the weights as they are
    def log_prob(self, trace: Trace) -> Float[Tensor, " n"]: ...

    def dreamt(self, trace: Trace) -> Imagination: ...


@runtime_checkable
class Policy(Protocol):
    """Observation to a chunk of m actions at control rate, physical units. State is explicit, reset by `where`."""

    @property
    def spec(
        self,
    ) -> WorldSpec: ...  # required of the world: cameras, poses, action convention, control steps per frame

    def reset(self, n: int) -> RowState: ...

    def act(
        self, observation: Observation, state: Any, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], RowState]:
        """`seeds` differ per row and per call; row i depends on row i alone."""
        ...


@runtime_checkable
class StochasticPolicy(Policy, Protocol):
    def log_prob(
        self, observation: Observation, state: Any, actions: Float[Tensor, "n m a"]
    ) -> Float[Tensor, " n"]: ...


@runtime_checkable
class ScorePolicy(Policy, Protocol):
    def score(self, observation: Observation, state: Any, actions: Float[Tensor, "n m a"]) -> Float[Tensor, "n m a"]:
        """Gradient of log-density with respect to `actions`."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Reward and success probability by frame, from `window` frames at the rate of `spec`; `name` is for provenance."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> WorldSpec: ...

    @property
    def window(self) -> int: ...

    @property
    def input(self) -> Literal["pixels", "latents"]: ...

    def reset(self, n: int) -> RowState: ...

    def step(
        self, state: Any, observation: Observation, action: Float[Tensor, "n k a"] | None
    ) -> tuple[RowState, Score]:
        """`action` is the block that led here; None at the first frame."""
        ...


@runtime_checkable
class ActionMap(Protocol):
    """Joins a policy that emits one kind of action to a world that takes another."""

    requires: ActionSpec
    provides: ActionSpec
    fingerprint: str
    error: float  # measured on held-out data, in `provides` units

    def __call__(self, actions: Float[Tensor, "n m a"], observation: Observation) -> Float[Tensor, "n m2 a2"]: ...


@runtime_checkable
class TrajectoryModel(Protocol):
    """Whole trajectories at once; neither observes nor imagines."""

    def sample(self, seeds: Int[Tensor, " n"], *, length: int) -> Float[Tensor, "n length d"]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorState:
    """A `RowState` of named tensors whose first axis is the row. Enough for most policies and scorers."""

    tensors: Mapping[str, Shaped[Tensor, "n ..."]]
    rows: int

    def __len__(self) -> int:
        return self.rows

    def index(self, rows: Int[Tensor, " r"]) -> "TensorState":
        return TensorState(tensors={k: v[rows] for k, v in self.tensors.items()}, rows=len(rows))

    def where(self, mask: Bool[Tensor, " n"], other: "TensorState") -> "TensorState":
        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(mask.to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)

        return TensorState(tensors={k: pick(other.tensors[k], v) for k, v in self.tensors.items()}, rows=self.rows)
