"""Where Meta-World's cameras stand, and how their pictures are turned upright.

As shipped, the four corner cameras are upside down and `corner2` is so far off that a drawer covers nine pixels of a
64x64 picture. `corner2` is therefore moved: it looks at the manipulated objects from the right, a drawer is then about
25 pixels wide and hand, object and goal stay in view for reach, push, drawer, door and button tasks. The other corners
are turned by 180 degrees (a rotation, so left and right stay true); topview, behindGripper and gripperPOV are upright.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A camera placed anew: position and the point looked at (metres, world frame), vertical field of view (degrees)."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    fovy: float


MOVED = {"corner2": View(position=(0.75, 0.35, 0.68), target=(-0.05, 0.68, 0.14), fovy=46.0)}
UPSIDE_DOWN = frozenset({"corner", "corner3", "corner4"})


def look_at(view: View) -> np.ndarray:
    """Rotation matrix (3, 3) whose columns are the camera's right, up and backward axes; world z is up."""
    backward = np.subtract(view.position, view.target)
    backward = backward / np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward], axis=1)


def project(view: View, point: np.ndarray, size: int) -> tuple[float, float]:
    """Where a world point lands in a `size` x `size` picture: (row, column) in pixels."""
    right, up, back = look_at(view).T @ (np.asarray(point) - view.position)
    scale = size / 2 / np.tan(np.radians(view.fovy) / 2) / -back
    return size / 2 - up * scale, size / 2 + right * scale


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Area mean of "h w c" uint8 over factor x factor cells, rounded."""
    if factor == 1:
        return image.copy()
    h, w, c = image.shape
    cells = image.reshape(h // factor, factor, w // factor, factor, c)
    return ((cells.sum(axis=(1, 3), dtype=np.uint32) + factor * factor // 2) // (factor * factor)).astype(np.uint8)
