"""The arm world's scenes: what lies in the nine cells, how a state tells it, and the MuJoCo model that draws it.

The model is made once; a scene only changes colours (a geom of alpha 0 is not drawn), which costs nothing at a reset. Every
tile carries a 4x4 grid of thin squares of which a pattern shows some, every cell one object of each shape of which one is
shown. The palette is the corners of the colour cube, as far apart as eight colours can be. Seen from above a standing
cylinder is a disc, so cylinders lie on their side. Nothing touches anything: there are no contacts and no gravity.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldline.sim.arm_kinematics import (
    CAMERA_ABOVE_HAND,
    CELLS,
    HAND_LOW,
    HIGH,
    JOINTS,
    LINK,
    LOW,
    TILE_HALF,
    WRIST_FOVY,
    inverse,
)

COLOURS = {
    "red": (0.86, 0.08, 0.08),
    "green": (0.08, 0.72, 0.12),
    "blue": (0.12, 0.16, 0.90),
    "yellow": (0.95, 0.88, 0.08),
    "magenta": (0.88, 0.10, 0.82),
    "cyan": (0.08, 0.82, 0.88),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.05),
}
SHAPES = ("box", "sphere", "cylinder")
PATTERNS = ("plain", "stripes", "checker")
CELL_COLUMNS = ("colour", "shape", "tile_first", "tile_second", "pattern")  # indices into the lists above
STATE_NAMES = (
    *(f"joint_{name}" for name in JOINTS),  # radians; metres for the lift
    *(f"velocity_{name}" for name in JOINTS),  # the same a second
    "target",  # cell 0 to 8 that `arm/reach` or `arm/place` asks for; -1 in other tasks
    *(f"cell{cell}_{name}" for cell in range(9) for name in CELL_COLUMNS),
)
TARGET = STATE_NAMES.index("target")
CELLS_FROM = TARGET + 1

TABLE, SCENERY, ARM = 0, 1, 2  # geom groups: cameras show some and not others
STEPS_PER_SECOND = 200  # of the physics
LINKS_AT = 0.2  # metres above the table
TILE_TOP = 0.004  # metres
_SQUARES = 4  # a tile's side in pattern squares


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """One drawn scene. `cells` "9 5" holds `CELL_COLUMNS`, `joints` "4" where the arm starts."""

    cells: np.ndarray
    joints: np.ndarray
    start: int  # the cell the hand starts above
    target: int  # a cell whose object no other is like; never the start

    def named(self, cell: int) -> str:
        """ "red box": colour and shape of a cell's object."""
        colour, shape = self.cells[cell, :2]
        return f"{tuple(COLOURS)[colour]} {SHAPES[shape]}"

    def unique(self) -> tuple[int, ...]:
        """Cells whose object differs in colour or shape from all others: those that a sentence can name."""
        kinds = [tuple(cell[:2]) for cell in self.cells.tolist()]
        return tuple(cell for cell, kind in enumerate(kinds) if kinds.count(kind) == 1)


def draw_scene(seed: int) -> Scene:
    """The scene of `seed` (>= 0), the same for every task. No two neighbours of a scene are promised to differ; within a
    cell the three colours do, and at least two objects besides the one below the hand can be named.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(4,)))
    start = int(rng.integers(9))
    while True:
        object_colour, first, second = rng.permuted(np.tile(np.arange(len(COLOURS)), (9, 1)), axis=1)[:, :3].T
        shape, pattern = rng.integers(len(SHAPES), size=9), rng.integers(len(PATTERNS), size=9)
        jitter, height, yaw = rng.uniform(-0.03, 0.03, size=2), rng.uniform(0.13, 0.18), rng.uniform(-0.5, 0.5)
        scene = Scene(
            cells=np.stack([object_colour, shape, first, second, pattern], axis=1),
            joints=inverse(np.array([*(CELLS[start] + jitter), height, yaw])),
            start=start,
            target=-1,
        )
        choices = [cell for cell in scene.unique() if cell != start]
        if len(choices) >= 2:
            return Scene(cells=scene.cells, joints=scene.joints, start=start, target=int(rng.choice(choices)))


def paint(model: Any, scene: Scene) -> None:
    """Give the model's tiles and objects the colours of `scene`; shapes and squares not in it become invisible."""
    palette = np.array(list(COLOURS.values()))
    for cell, (colour, shape, first, second, pattern) in enumerate(scene.cells.tolist()):
        model.geom(f"tile{cell}").rgba[:] = (*palette[first], 1.0)
        for i, j in itertools.product(range(_SQUARES), repeat=2):
            shown = (False, i % 2 == 0, (i + j) % 2 == 0)[pattern]
            model.geom(f"square{cell}_{i}{j}").rgba[:] = (*palette[second], float(shown))
        for index, name in enumerate(SHAPES):
            model.geom(f"{name}{cell}").rgba[:] = (*palette[colour], float(index == shape))


def state_of(joints: np.ndarray, velocities: np.ndarray, target: int, scene: Scene) -> np.ndarray:
    """The state (float64) whose columns are `STATE_NAMES`."""
    return np.concatenate([joints, velocities, [target], scene.cells.ravel()])


def mjcf(pixels: int) -> str:
    """The MuJoCo model of table, cells and arm, for pictures of `pixels` x `pixels`.

    The joints' inertia is their gears' (armature 1 kg m²), so that a target is followed alike in every pose: critically
    damped at 16 rad/s, 0.125 s or five control steps behind, and no faster than the force allows (2.5 rad/s, 0.4 m/s).
    """
    joint = 'armature="1" damping="32"'
    ranges = {name: f"{low} {high}" for name, low, high in zip(JOINTS, LOW, HIGH)}
    force = {name: 12.8 if name == "lift" else 80.0 for name in JOINTS}
    actuators = "\n".join(
        f'<position name="{name}" joint="{name}" kp="256" ctrlrange="{ranges[name]}" forcerange="{-force[name]} {force[name]}"/>'
        for name in JOINTS
    )
    return f"""
<mujoco model="arm">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{1 / STEPS_PER_SECOND}" gravity="0 0 0" integrator="implicitfast"><flag contact="disable"/></option>
  <visual>
    <global offwidth="{pixels}" offheight="{pixels}"/>
    <quality offsamples="0"/>
    <headlight ambient="0.55 0.55 0.55" diffuse="0 0 0" specular="0 0 0"/>
  </visual>
  <default><geom type="box" mass="0.01"/></default>
  <worldbody>
    <light directional="true" dir="0.5 0.35 -1" diffuse="0.55 0.55 0.55" specular="0 0 0" castshadow="false"/>
    <camera name="top" pos="0.03 0.29 3" fovy="19"/>
    <geom name="table" group="{TABLE}" size="0.48 0.48 0.02" pos="0.03 0.29 -0.02" rgba="0.58 0.48 0.38 1"/>
    {"".join(_cell(cell) for cell in range(len(CELLS)))}
    <geom group="{ARM}" type="cylinder" size="0.06 0.08" pos="0 0 0.08" rgba="0.3 0.3 0.35 1"/>
    <body pos="0 0 {LINKS_AT}">
      <joint name="base" axis="0 0 1" range="{ranges["base"]}" {joint}/>
      <geom group="{ARM}" size="0.022 {LINK / 2} 0.02" pos="0 {LINK / 2} 0" rgba="0.45 0.47 0.52 1"/>
      <geom group="{ARM}" type="cylinder" size="0.035 0.03" pos="0 {LINK} 0" rgba="0.25 0.25 0.3 1"/>
      <body pos="0 {LINK} 0">
        <joint name="elbow" axis="0 0 1" range="{ranges["elbow"]}" {joint}/>
        <geom group="{ARM}" size="0.018 {LINK / 2} 0.015" pos="0 {LINK / 2} 0.03" rgba="0.68 0.70 0.74 1"/>
        <body pos="0 {LINK} {HAND_LOW - LINKS_AT}">
          <joint name="lift" type="slide" axis="0 0 1" range="{ranges["lift"]}" {joint}/>
          <joint name="wrist" axis="0 0 1" range="{ranges["wrist"]}" {joint}/>
          <geom group="{ARM}" type="cylinder" size="0.02 0.12" pos="0 0 0.12" rgba="0.3 0.3 0.35 1"/>
          <geom group="{ARM}" type="cylinder" size="0.03 0.01" pos="0 0 0.24" rgba="1 0.5 0 1"/>
          <geom group="{ARM}" size="0.012 0.04 0.01" pos="0 0.05 0.24" rgba="1 0.5 0 1"/>
          <camera name="wrist" pos="0 0 {CAMERA_ABOVE_HAND}" fovy="{WRIST_FOVY}"/>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>{actuators}</actuator>
</mujoco>"""


def _cell(cell: int) -> str:
    """A tile, its pattern squares and one object of each shape, all in the group `SCENERY`."""
    x, y = CELLS[cell]
    square = TILE_HALF / _SQUARES
    geoms = [f'name="tile{cell}" size="{TILE_HALF} {TILE_HALF} 0.001" pos="{x} {y} 0.001"']
    for i, j in itertools.product(range(_SQUARES), repeat=2):
        left, near = x - TILE_HALF + (2 * i + 1) * square, y - TILE_HALF + (2 * j + 1) * square
        geoms.append(
            f'name="square{cell}_{i}{j}" size="{square} {square} 0.001" pos="{left} {near} {TILE_TOP - 0.001}"'
        )
    geoms += [
        f'name="box{cell}" size="0.031 0.031 0.02" pos="{x} {y} {TILE_TOP + 0.02}"',
        f'name="sphere{cell}" type="sphere" size="0.034" pos="{x} {y} {TILE_TOP + 0.034}"',
        f'name="cylinder{cell}" type="cylinder" size="0.019 0.05" pos="{x} {y} {TILE_TOP + 0.019}" zaxis="0.8 0.6 0"',
    ]
    return "\n".join(f'<geom group="{SCENERY}" rgba="1 1 1 0" {geom}/>' for geom in geoms)
