"""FVD (Unterthiner et al. 1812.01717) with the I3D network of the StyleGAN-V protocol, where its weights are given.

The weights (a TorchScript file, usually `i3d_torchscript.pt`) are not part of this package and are not downloaded. Frames
are scaled to [-1, 1] and resized to 224x224 (bilinear, the whole frame), clips have 16 frames, and the network is called
with `rescale=False, resize=False, return_features=True`, which gives 400 logits before the softmax. Nothing else goes by
the name FVD here. `torch.jit.load` runs the file's own code in TorchScript's interpreter: use a file you trust.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval.frechet import FrechetDistance, distance_of_features
from worldline.eval.protocol import PROTOCOL

SIDE, FEATURES = 224, 400
BATCH = 4  # clips a call: one is 10 MB of pixels


def load_i3d(path: str | Path) -> torch.jit.ScriptModule:
    """The I3D network from a TorchScript file. Raises `WorldlineError` if there is none or it is no TorchScript."""
    if not Path(path).is_file():
        raise WorldlineError(f"I3D weights: a TorchScript file required, there is none at {path}.")
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise WorldlineError(f"I3D weights: {path} is not a TorchScript file ({reason}).") from error


@torch.inference_mode()
def i3d_features(network: Any, video: UInt8[Tensor, "n t c h w"]) -> Float[np.ndarray, "n d"]:
    """400 features of clips of 16 frames. Raises `WorldlineError` for other lengths and for a network that is not I3D."""
    if video.shape[1] != PROTOCOL.clip_frames:
        raise WorldlineError(f"FVD: clips of {PROTOCOL.clip_frames} frames required, got {video.shape[1]}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, parts = network.to(device), []
    for clips in video.split(BATCH):
        frames = clips.flatten(0, 1).to(device).float().expand(-1, 3, -1, -1) / 127.5 - 1
        frames = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
        stacked = frames.unflatten(0, clips.shape[:2]).transpose(1, 2)  # n c t h w
        try:
            found = network(stacked, rescale=False, resize=False, return_features=True)
        except (RuntimeError, torch.jit.Error) as error:  # wrong arguments; an error inside the network
            reason = str(error).strip().splitlines()[0]
            raise WorldlineError(
                f"FVD: the file given is not the I3D of the StyleGAN-V protocol ({reason})."
            ) from error
        parts.append(found.double().cpu())
    features = torch.cat(parts)
    if features.ndim != 2 or features.shape[1] != FEATURES:
        raise WorldlineError(f"FVD: I3D gives {FEATURES} features a clip, this file gives {tuple(features.shape[1:])}.")
    return features.numpy()


def frechet_video_distance(
    real: UInt8[Tensor, "n t c h w"], imagined: UInt8[Tensor, "n t c h w"], network: Any
) -> FrechetDistance:
    """FVD of clips of 16 frames of one camera, row i of both being the same episode.

    400 dimensions ask for 800 clips; with fewer the `note` says so. Compare only at equal numbers of clips.

    Args:
        network: from `load_i3d`.

    Raises:
        WorldlineError: fewer than four clips, clips of another length, or a network that is not I3D.
    """
    return distance_of_features(i3d_features(network, real), i3d_features(network, imagined))
