"""Geometry of the arm world: joints to hand and back, the grid of cells, and what the wrist camera has in sight.

Plain trigonometry in NumPy, so that behaviours and readers of recorded states need no simulator. The arm is a SCARA: two
equal horizontal links turned by `base` and `elbow` (0: pointing along +y, away from the base; positive counter-clockwise seen
from above), a vertical slide `lift`, and a `wrist` that turns the hand. Of the two ways to fold the elbow only one is within
its range, so every hand position has one answer. Metres and radians; z is up, the table's top is z = 0, the base at x = y = 0.

The wrist camera looks straight down from above the hand: the picture's centre is the table point below the hand, and the
patch it shows is a square that grows with the lift and turns with the hand.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

JOINTS = ("base", "elbow", "lift", "wrist")
LOW = np.array([-2.25, 0.5, 0.0, -2.75])  # radians, and metres for the lift; exact in float32
HIGH = np.array([0.5, 2.75, 0.125, 0.75])
LINK = 0.35  # metres, both links
HAND_LOW = 0.06  # metres above the table at lift 0

SPACING = 0.2  # metres between neighbouring cells
CELLS = np.array([((column - 1) * SPACING, 0.2 + row * SPACING) for row in range(3) for column in range(3)])
PLACES = tuple(
    f"{row} {column}" for row in ("near", "central", "far") for column in ("left", "middle", "right")
)  # of cells
TILE_HALF = 0.065  # metres: a cell is seen as long as a part of its tile is

CAMERA_ABOVE_HAND = 0.135  # metres
_HIGHEST = HAND_LOW + float(HIGH[2]) + CAMERA_ABOVE_HAND
WRIST_FOVY = float(2 * np.degrees(np.arctan(0.1 / _HIGHEST)))  # shows a patch of 0.2 m from there, 0.12 m from lift 0


def forward(joints: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n 4"]:
    """Joint positions (`JOINTS`) to the hand's x, y, z (metres) and yaw (radians, the sum of the turning joints)."""
    base, elbow, lift, wrist = np.moveaxis(np.asarray(joints, dtype=np.float64), -1, 0)
    outer = base + elbow
    x = -LINK * (np.sin(base) + np.sin(outer))
    y = LINK * (np.cos(base) + np.cos(outer))
    return np.stack([x, y, HAND_LOW + lift, outer + wrist], axis=-1)


def inverse(hand: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n 4"]:
    """The joint positions that bring the hand to x, y, z, yaw: exact within reach, else the nearest within the ranges."""
    x, y, z, yaw = np.moveaxis(np.asarray(hand, dtype=np.float64), -1, 0)
    elbow = 2 * np.arccos(np.clip(np.hypot(x, y) / (2 * LINK), 0.0, 1.0))
    elbow = np.clip(elbow, LOW[1], HIGH[1])
    base = np.clip(np.arctan2(-x, y) - elbow / 2, LOW[0], HIGH[0])
    return np.clip(np.stack([base, elbow, z - HAND_LOW, yaw - base - elbow], axis=-1), LOW, HIGH)


def nearest_cell(hand: Float[np.ndarray, "*n 4"]) -> Int[np.ndarray, "*n"]:
    """The cell (0 to 8, three to a row, the row nearest the base first) whose centre is closest to the hand."""
    return np.asarray(np.linalg.norm(hand[..., None, :2] - CELLS, axis=-1).argmin(axis=-1))


def centred_cell(joints: Float[np.ndarray, "*n 4"]) -> Int[np.ndarray, "*n"]:
    """The cell whose tile is at the centre of the wrist camera's picture, -1 where the centre shows bare table."""
    hand = forward(joints)
    nearest = nearest_cell(hand)
    inside = np.abs(hand[..., :2] - CELLS[nearest]).max(axis=-1) <= TILE_HALF
    return np.where(inside, nearest, -1)


def tiles_in_sight(joints: Float[np.ndarray, "*n 4"]) -> Bool[np.ndarray, "*n 9"]:
    """Which cells' tiles lie at least in part within the wrist camera's picture.

    Two squares, the patch in view and the tile, are apart if the sides of one of them separate them.
    """
    x, y, z, yaw = np.moveaxis(forward(joints)[..., None, :], -1, 0)
    view = np.tan(np.radians(WRIST_FOVY) / 2) * (z + CAMERA_ABOVE_HAND)
    dx, dy = CELLS[:, 0] - x, CELLS[:, 1] - y
    cos, sin = np.cos(yaw), np.sin(yaw)
    turned = np.abs(cos) + np.abs(sin)
    by_tile = np.maximum(np.abs(dx), np.abs(dy)) <= TILE_HALF + view * turned
    by_view = np.maximum(np.abs(cos * dx + sin * dy), np.abs(cos * dy - sin * dx)) <= view + TILE_HALF * turned
    return by_tile & by_view
