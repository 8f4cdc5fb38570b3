"""The arm as a simulated world: scenes by seed, clipped and lagging joint targets, what each camera sees, its behaviours."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from worldline.commands.recording import Record, run_record
from worldline.data.lerobot_read import LeRobotDataset
from worldline.errors import SimulatorError
from worldline.sim import (
    SimulatedWorld,
    WorldPool,
    arm,
    disjoint_starts,
    episode_seed,
    make_world,
    record,
    rollout_actions,
)
from worldline.sim.arm import ArmWorld, cell_in_view, cells_in_sight
from worldline.sim.arm_behaviours import AWAY, BLENDS, CAUSES, arm_behaviour, arm_cause
from worldline.sim.arm_kinematics import CAMERA_ABOVE_HAND, CELLS, HIGH, LOW, PLACES, WRIST_FOVY, forward, inverse
from worldline.sim.arm_scene import (
    CELL_COLUMNS,
    CELLS_FROM,
    COLOURS,
    SHAPES,
    STATE_NAMES,
    TARGET,
    TILE_TOP,
    draw_scene,
    paint,
)

SMALL = {"size": 32, "horizon": 24, "progress": False, "seed": 3}


def cells_of(state: torch.Tensor) -> torch.Tensor:
    return state[CELLS_FROM:].reshape(9, len(CELL_COLUMNS)).int()


def nearest_colours(pixels: torch.Tensor) -> torch.Tensor:
    """Index into the palette of each pixel "c ...", -1 where the table is nearer; brightness by light is divided out."""
    palette = torch.tensor([*COLOURS.values(), (0.58, 0.48, 0.38)])
    distance = (pixels.float().movedim(0, -1)[..., None, :] / 255 - palette).norm(dim=-1)
    return torch.where(distance.argmin(-1) == len(COLOURS), -1, distance.argmin(-1))


def go_to(world: SimulatedWorld, hand: np.ndarray, frames: int = 10) -> arm.SimFrame:
    target = torch.from_numpy(inverse(hand)).float().expand(world.spec.control_steps, -1)
    return [world.step(target) for _ in range(frames)][-1].frame


def played(world: SimulatedWorld, cause: str, seed: int, **options: int) -> tuple[torch.Tensor, list[bool | None]]:
    """States "t s" and success of a whole episode."""
    states = [world.reset(seed).state]
    task = world.task if isinstance(world, ArmWorld) else ""
    act = arm_behaviour(cause, task, seed=seed, horizon=world.horizon, **options)
    steps = [world.drive(act) for _ in range(world.horizon // world.spec.control_steps)]
    return torch.stack(states + [step.frame.state for step in steps]), [step.success for step in steps]


def test_hand_and_joints_are_each_others_answer() -> None:
    rng = np.random.default_rng(0)
    spots = np.concatenate([CELLS] * 50) + rng.uniform(-0.03, 0.03, size=(450, 2))
    hand = np.concatenate([spots, rng.uniform(0.06, 0.185, (450, 1)), rng.uniform(-0.6, 0.6, (450, 1))], axis=1)
    joints = inverse(hand)
    assert np.allclose(forward(joints), hand, atol=1e-9)
    assert (joints >= LOW).all() and (joints <= HIGH).all()
    assert np.allclose(inverse(np.array([0.0, 9.0, 0.1, 0.0]))[1], LOW[1]), "out of reach: as straight as it goes"


def test_seeds_decide_scenes_and_tasks_share_them() -> None:
    check = disjoint_starts("arm/reach", range(30), range(100, 130))
    assert check.disjoint
    world, other = make_world("arm/reach", cameras=()), make_world("arm/revisit", cameras=())
    assert isinstance(world, SimulatedWorld) and world.spec.fps == 10.0 and world.instruction == "reach an object"
    said = set()
    for seed in range(40):
        state, blind = world.reset(seed).state, other.reset(seed).state
        assert len(state) == len(STATE_NAMES) and torch.equal(state[CELLS_FROM:], blind[CELLS_FROM:])
        cells = cells_of(state)
        target = int(state[TARGET])
        kinds = Counter(tuple(kind) for kind in cells[:, :2].tolist())
        colour, shape = cells[target, :2].tolist()
        assert (
            kinds[(colour, shape)] == 1 and world.instruction == f"reach the {tuple(COLOURS)[colour]} {SHAPES[shape]}"
        )
        assert all(len({cell[0], cell[2], cell[3]}) == 3 for cell in cells.tolist()), "told from its tile by colour"
        assert target != int(cell_in_view(state[None])[0])
        assert int(blind[TARGET]) == -1 and other.instruction == "look around and return"
        said.add(world.instruction)
    assert len(said) > 15


def test_a_start_does_not_depend_on_what_was_played_before() -> None:
    world = make_world("arm/reach", horizon=40)
    block = torch.from_numpy(np.linspace(LOW, HIGH, 4)).float()
    first, then = world.reset(5), world.step(block)
    world.reset(6)
    for _ in range(10):
        world.step(block.flip(0))
    again, later = world.reset(5), world.step(block)
    for a, b in ((first, again), (then.frame, later.frame)):
        assert torch.equal(a.state, b.state) and torch.equal(a.pose, b.pose)
        assert all(torch.equal(a.images[camera], b.images[camera]) for camera in ("top", "wrist"))
    assert first.images["wrist"].shape == (3, 64, 64)
    world.close()


def test_joint_targets_are_clipped_and_followed_with_a_lag() -> None:
    world = make_world("arm/revisit", cameras=(), control_steps=1, horizon=80)
    start = world.reset(0)
    target = start.state[:4] + torch.tensor([0.2, 9.0, -9.0, 0.2])
    steps = [world.step(target[None]) for _ in range(80)]
    low, high = torch.tensor(world.spec.action.low), torch.tensor(world.spec.action.high)
    sent = target.clamp(low, high)
    assert all(torch.equal(step.consumed[0], sent) for step in steps)
    moved = torch.stack([step.frame.state[0] - start.state[0] for step in steps]) / 0.2
    assert moved[0] < 0.15 and 0.4 < moved[4] < 0.8 and moved.max() < 1.01, "some control steps behind, no overshoot"
    assert torch.allclose(steps[-1].frame.state[:4], sent, atol=2e-3)
    assert torch.allclose(steps[-1].frame.pose, torch.from_numpy(forward(sent.double().numpy())).float(), atol=2e-3)
    assert steps[-1].truncated and not steps[-1].terminated and steps[-1].success is None and steps[-1].reward == 0


def test_the_wrist_camera_sees_what_the_state_says() -> None:
    """Colour at the centre above each cell; elsewhere the object is at the pixel that the pose puts it."""
    world = make_world("arm/revisit", cameras=("wrist",), horizon=10_000)
    rng = np.random.default_rng(1)
    for seed in range(2):
        world.reset(seed)
        for cell, spot in enumerate(CELLS):
            frame = go_to(world, np.array([*spot, 0.15, 0.0]), frames=14)
            colour, shape = cells_of(frame.state)[cell, :2].tolist()
            assert (nearest_colours(frame.images["wrist"][:, 29:35, 29:35]) == colour).float().mean() > 0.8
            assert int(cell_in_view(frame.state[None])[0]) == cell

            hand = np.array([*(spot + rng.uniform(-0.03, 0.03, 2)), rng.uniform(0.15, 0.18), rng.uniform(-0.5, 0.5)])
            frame = go_to(world, hand, frames=8)
            if shape != 0 or cells_in_sight(frame.state[None]).sum() > 1:
                continue
            x, y, z, yaw = frame.pose.tolist()
            scale = (
                32 / np.tan(np.radians(WRIST_FOVY) / 2) / (z + CAMERA_ABOVE_HAND - TILE_TOP - 0.04)
            )  # of the box's upper side
            right, up = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]]) @ (spot - (x, y))
            mask = nearest_colours(frame.images["wrist"]) == colour
            row, column = (mask.nonzero().float().mean(0) + 0.5).tolist()
            assert abs(column - (32 + right * scale)) < 2 and abs(row - (32 - up * scale)) < 2
    world.close()


def test_what_is_in_sight_is_what_changes_the_picture() -> None:
    """A cell is in the wrist's picture if and only if drawing it anew changes pixels (but for slivers below a pixel)."""
    world = ArmWorld("revisit", cameras=("wrist",), horizon=10_000)
    rng = np.random.default_rng(2)
    agree, seen = [], []
    world.reset(0)
    for _ in range(20):
        hand = np.array([*rng.uniform((-0.3, 0.15), (0.3, 0.68)), rng.uniform(0.06, 0.185), rng.uniform(-0.8, 0.8)])
        go_to(world, hand, frames=8)
        scene = draw_scene(0)
        sight = cells_in_sight(world._frame().state[None])[0].tolist()
        paint(world._model, scene)
        before = world._render("wrist")
        for cell in range(9):
            other = scene.cells.copy()
            other[cell, [0, 2, 3]] = [c for c in range(8) if c not in other[cell, [0, 2, 3]]][:3]
            paint(world._model, dataclasses.replace(scene, cells=other))
            changed = not torch.equal(before, world._render("wrist"))
            assert sight[cell] or not changed, "what is out of sight cannot show"
            agree.append(sight[cell] == changed)
            seen.append(changed)
    world.close()
    assert np.mean(agree) > 0.97 and 0.08 < np.mean(seen) < 0.5


@pytest.mark.parametrize("task", ["reach", "place", "revisit"])
def test_only_the_wrist_camera_sees_the_objects_of_revisit(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joints = draw_scene(0).joints
    monkeypatch.setattr(arm, "draw_scene", lambda seed: dataclasses.replace(draw_scene(seed), joints=joints))
    world = make_world(f"arm/{task}")
    one, two = world.reset(1), world.reset(2)
    world.close()
    assert torch.equal(one.pose, two.pose)
    assert not torch.equal(one.images["wrist"], two.images["wrist"])
    assert torch.equal(one.images["top"], two.images["top"]) == (task == "revisit")
    assert one.images["top"].float().std() > 10


def test_places_are_named_as_the_top_camera_shows_them() -> None:
    """Left is left in the picture, far is at its top: the hand's pixels say so."""
    world = make_world("arm/place", cameras=("top",))
    assert isinstance(world, ArmWorld) and world.instruction == "reach a tile"
    scene = world.reset(3)
    assert world.instruction == f"reach the {PLACES[int(scene.state[TARGET])]} tile" and world.targets == tuple(
        range(9)
    )
    seen = {}
    for cell in (0, 2, 6):
        picture = go_to(world, np.array([*CELLS[cell], 0.15, 0.0]), frames=12).images["top"].float()
        orange = (picture[0] > 180) & (picture[1] > 90) & (picture[1] < 160) & (picture[2] < 60)  # the hand
        rows, columns = orange.nonzero().float().mean(0).tolist()
        seen[PLACES[cell]] = (rows, columns)
        world.reset(3)
    world.close()
    assert seen["near left"][1] < seen["near right"][1] - 5 and seen["far left"][0] < seen["near left"][0] - 5


@pytest.mark.parametrize("task", ["reach", "place"])
def test_another_target_changes_the_instruction_and_nothing_that_is_seen(task: str) -> None:
    world = ArmWorld(task)
    first = world.reset(4)
    said = {world.instruction}
    for cell in world.targets:
        frame = world.choose_target(cell)
        assert all(torch.equal(frame.images[camera], first.images[camera]) for camera in ("top", "wrist"))
        assert torch.equal(frame.pose, first.pose)
        assert (frame.state != first.state).nonzero().flatten().tolist() in ([], [TARGET])
        said.add(world.instruction)
    assert len(said) == len(world.targets) > 1
    chosen = int(frame.state[TARGET])
    go_to(world, np.array([*CELLS[chosen], 0.15, 0.0]))
    assert (
        world.step(torch.from_numpy(inverse(np.array([*CELLS[chosen], 0.11, 0.0]))).float().repeat(4, 1)).success
        is False
    )
    low = torch.from_numpy(inverse(np.array([*CELLS[chosen], 0.07, 0.0]))).float().repeat(4, 1)
    assert any(world.step(low).success for _ in range(6)) and world.step(low).reward == 4.0
    assert world.reset(4).state[TARGET] == first.state[TARGET]
    world.close()


@pytest.mark.parametrize("task", ["reach", "place"])
def test_the_expert_succeeds_and_the_others_mostly_do_not(task: str) -> None:
    world = make_world(f"arm/{task}", cameras=())
    rate = {c: np.mean([any(played(world, c, s)[1]) for s in range(10)]) for c in CAUSES[task]}
    assert rate["expert"] >= 0.9
    assert max(rate["wrong_object"], rate["freeze"]) == 0 and max(rate["play"], rate["random"]) <= 0.4


@pytest.mark.parametrize(("horizon", "control_steps", "away"), [(280, 4, None), (400, 4, 60), (220, 2, None)])
def test_revisit_leaves_its_cell_for_long_and_returns(horizon: int, control_steps: int, away: int | None) -> None:
    world = make_world("arm/revisit", cameras=(), horizon=horizon, control_steps=control_steps)
    times, others = [], []
    for seed in range(12):
        options = {"control_steps": control_steps} | ({} if away is None else {"away": away})
        states, success = played(world, "revisit", seed, **options)
        assert set(success) == {None}
        centred = cell_in_view(states).tolist()
        home = centred[0]
        out = (~cells_in_sight(states)[:, home]).nonzero().flatten()
        assert out[0] >= 4 and len(out) == out[-1] - out[0] + 1, "seen, then away in one piece"
        assert centred[-3:] == [home] * 3
        times.append(len(out))
        others.append(len({*centred} - {-1, home}))
    assert min(times) >= (away or AWAY[0]) and (away or len(set(times)) > 3)
    assert min(others) >= 3


def test_play_does_not_come_to_rest() -> None:
    world = make_world("arm/revisit", cameras=(), horizon=480)
    for seed in range(3):
        states, _ = played(world, "play", seed)
        moves = np.abs(np.diff(forward(states[:, :4].double().numpy()), axis=0)).max(axis=1)
        assert moves.min() > 1e-3 and moves[100:].mean() > 0.01
        assert len({*cell_in_view(states).tolist()} - {-1}) >= 5


@pytest.mark.parametrize("task", ["reach", "revisit"])
def test_blends_hold_their_shares_and_causes_are_functions_of_the_seed(task: str) -> None:
    for policy, shares in BLENDS[task].items():
        assert Counter(arm_cause(task, policy, 7, i) for i in range(20, 40)) == Counter(shares)
    world = make_world(f"arm/{task}", cameras=(), horizon=280)
    for cause in CAUSES[task]:
        assert torch.equal(played(world, cause, 1)[0], played(world, cause, 1)[0])


@pytest.mark.parametrize("processes", [0, 2])
def test_rollouts_tell_each_row_its_own_instruction(processes: int) -> None:
    world, seeds = make_world("arm/reach", cameras=()), [7, 11]
    wanted = []
    for seed in seeds:
        world.reset(seed)
        wanted.append(world.instruction)
    with WorldPool("arm/reach", rows=2, processes=processes, cameras=(), horizon=8) as pool:
        pool.reset(dict(enumerate(seeds)))
        assert [pool.instructions([0, 1])[row] for row in (0, 1)] == wanted and wanted[0] != wanted[1]


def test_recorded_episodes_carry_their_instructions(tmp_path: Path) -> None:
    run_record(Record(world="arm/reach", out=tmp_path / "d", episodes=2, size=32, horizon=24, seed=3), progress=False)
    data = LeRobotDataset(tmp_path / "d")
    world = make_world("arm/reach", cameras=(), horizon=24)
    assert data.spec.action == world.spec.action and data.spec.action.kind == "absolute" and len(data) == 2
    for index in range(2):
        episode = data.episode(index)
        poses = [world.reset(episode_seed(3, index)).pose]
        assert episode.instruction == world.instruction and episode.success is not None
        assert episode.provenance["policy"] == "mixed" and episode.provenance["cause"] in CAUSES["reach"]
        poses += [world.step(block).frame.pose for block in episode.actions]
        assert torch.allclose(torch.stack(poses), episode.poses, atol=1e-6)
        assert episode.states.shape == (7, len(STATE_NAMES)) and episode.frames["wrist"][:].shape == (7, 3, 32, 32)
    assert data.episode(0).instruction != data.episode(1).instruction


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="did you mean reach"):
        make_world("arm/raech")
    with pytest.raises(SimulatorError, match="known: place, reach, revisit"):
        make_world("arm/")
    with pytest.raises(SimulatorError, match="did you mean wrist"):
        make_world("arm/reach", cameras=("wirst",))
    with pytest.raises(SimulatorError, match='"arm/<task>"'):
        make_world("amr/reach")
    world = ArmWorld("revisit", cameras=(), horizon=4)
    with pytest.raises(SimulatorError, match="reset"):
        world.step(torch.zeros(4, 4))
    with pytest.raises(SimulatorError, match="at least 0"):
        world.reset(-1)
    world.reset(0)
    with pytest.raises(SimulatorError, match="arm/reach"):
        world.choose_target(0)
    with pytest.raises(SimulatorError, match=r"\(4, 4\) required"):
        world.step(torch.zeros(4, 3))
    world.step(torch.zeros(4, 4))
    with pytest.raises(SimulatorError, match="ended"):
        world.step(torch.zeros(4, 4))
    reach = ArmWorld("reach", cameras=())
    reach.reset(0)
    with pytest.raises(SimulatorError, match="got 9"):
        reach.choose_target(9)
    with pytest.raises(SimulatorError, match="54 columns"):
        cell_in_view(torch.zeros(2, 39))
    with pytest.raises(SimulatorError, match="unknown cause 'expert'"):
        arm_behaviour("expert", "revisit", seed=0, horizon=280)
    for policy in ("revisit", "mixed"):
        with pytest.raises(SimulatorError, match=r"at least 248 control steps .* got 24"):
            record("arm/revisit", tmp_path / "r", episodes=2, policy=policy, **SMALL)
    with pytest.raises(SimulatorError, match="did you mean expert"):
        record("arm/reach", tmp_path / "e", episodes=2, policy="expret", **SMALL)
    assert not list(tmp_path.iterdir())


def test_after_the_given_blocks_the_arm_stays_where_it_was_sent() -> None:
    pool = WorldPool("arm/reach", rows=1, cameras=(), horizon=160)
    try:
        target = torch.tensor([-1.0, 1.5, 0.1, 0.2])
        (result,) = rollout_actions(pool, target.expand(1, 20, 4, 4).contiguous(), seeds=[3])
    finally:
        pool.close()
    assert torch.equal(result.actions[-1, -1], target)
    assert torch.allclose(result.poses[-1], result.poses[20], atol=0.02)
