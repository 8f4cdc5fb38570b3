"""The trivial predictor every world model must beat: nothing moves. (The other, the action-free model, is
`TransformerConfig(actions=False)`.)"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldline.types import Clip, Imagination, TensorState, WorldSpec

_POSE = "/pose"  # no camera is called this


class CopyLastFrame:
    """A `WorldModel` that repeats the last observed frame and pose for ever."""

    def __init__(self, spec: WorldSpec) -> None:
        self.spec = spec

    def observe(self, clip: Clip) -> TensorState:
        tensors = {camera: z[:, -1] for camera, z in clip.frames.items()}
        return TensorState(tensors={**tensors, _POSE: clip.poses[:, -1]}, rows=len(clip.poses))

    def imagine(
        self, state: TensorState, actions: Float[Tensor, "n f k a"], *, seeds: Int[Tensor, " n"]
    ) -> tuple[TensorState, Imagination]:
        repeated = {k: torch.stack([v] * actions.shape[1], 1) for k, v in state.tensors.items()}
        poses = repeated.pop(_POSE)
        return state, Imagination(latents=repeated, poses=poses)
