"""The dense networks beside the transformer: what they are told, and that the pose's one learns an arm that lags."""

import torch

from worldline.worldmodels.guesses import STEP, PoseGuess, motion_of


def lagging_arm(rows: int, frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An arm that ends each block half-way to its command: the last frame alone does not say how far it still has to go."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randn(rows, frames - 1, 2, generator=generator)
    command, pose = torch.zeros(rows, 2), torch.zeros(rows, 2)
    poses = [pose]
    for i in range(frames - 1):
        command = command + STEP * actions[:, i]
        pose = pose + 0.5 * (command - pose)
        poses.append(pose)
    return torch.stack(poses, 1), actions


def step(net: PoseGuess, poses: torch.Tensor, actions: torch.Tensor, i: int) -> torch.Tensor:
    """The pose of frame i, by what is known of frame i-1."""
    before = poses[:, i - 2] if i > 1 else poses[:, i - 1]
    block = actions[:, i - 2] if i > 1 else torch.zeros_like(actions[:, 0])
    return net(motion_of(poses[:, i - 1], before, block), actions[:, i - 1], torch.ones(len(poses)))


def test_pose_guess_learns_a_lag_and_keeps_to_it_over_a_rollout() -> None:
    torch.manual_seed(0)
    net = PoseGuess(64, 2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for k in range(300):
        poses, actions = lagging_arm(32, 8, 1 + k)
        guessed = torch.stack([step(net, poses, actions, i) for i in range(1, 8)], 1)
        loss = ((guessed - poses[:, 1:]) / STEP).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    poses, actions = lagging_arm(64, 16, 0)
    dreamt = [poses[:, 0]]
    with torch.no_grad():
        for i in range(1, 16):
            dreamt.append(step(net, torch.stack([*dreamt], 1), actions, i))
    error = (torch.stack(dreamt, 1) - poses).square().mean((0, 2)).sqrt()
    # without the memory: the whole block is taken to arrive at once, the best there is on average
    memoryless = poses[:, :1] + torch.cat([torch.zeros(64, 1, 2), STEP * actions], 1).cumsum(1)
    assert float(error[1:].max()) < 0.5 * float((memoryless - poses).square().mean((0, 2)).sqrt()[1:].min())


def test_a_frame_whose_action_is_not_told_is_guessed_at_the_last_pose() -> None:
    net, motion = PoseGuess(8, 3, 4), torch.randn(2, 2, 10)
    guessed = net(motion, torch.randn(2, 2, 4), torch.tensor([[False, True], [False, True]]))
    assert torch.equal(guessed[:, 0], motion[:, 0, :3]) and bool((guessed[:, 1] != motion[:, 1, :3]).all())


def slow_arm(rows: int, frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An arm that goes to the commanded point at a tenth a frame at the most: commands wind up far ahead of it, and back."""
    generator = torch.Generator().manual_seed(seed)
    trend = torch.randn(rows, 1, 1, generator=generator) * torch.sin(torch.arange(frames - 1) / 4)[:, None]
    actions = trend + 0.5 * torch.randn(rows, frames - 1, 1, generator=generator)
    command = pose = torch.zeros(rows, 1)
    poses = [pose]
    for i in range(frames - 1):
        command = (command + 0.15 * actions[:, i]).clamp(-1, 1)
        pose = pose + (command - pose).clamp(-0.1, 0.1)
        poses.append(pose)
    return torch.stack(poses, 1), actions


def test_an_aim_tells_how_far_commands_have_wound_up() -> None:
    """Trained by following their own guesses; rows whose first frames are not there are taken from where they begin."""
    errors = {}
    for aims in (False, True):
        torch.manual_seed(0)
        net = PoseGuess(64, 1, 1, aims=aims)
        net.init_weights()
        net.fit_gain(zip(*slow_arm(64, 24, 1)))
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for k in range(400):
            poses, actions = slow_arm(32, 24, 1 + k)
            first = torch.randint(0, 2, (32,)) * 5  # of half of the rows five frames of padding
            poses, actions = (torch.cat([torch.zeros_like(x[:, :5]), x], 1)[:, :24] for x in (poses, actions))
            begun = torch.where(first[:, None, None] > 0, poses, poses.roll(-5, 1))[:, :19]
            sent = torch.where(first[:, None, None] > 0, actions, actions.roll(-5, 1))[:, :18]
            guessed = net.follow(begun, sent, net.aims(begun, sent, first), first)
            missed = ((guessed - begun[:, 1:]) / STEP).square()[..., 0]
            loss = missed[torch.arange(18) >= first[:, None]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        poses, actions = slow_arm(128, 40, 0)
        start = torch.zeros(128, dtype=torch.long)
        with torch.no_grad():
            guessed = net.follow(poses, actions, net.aims(poses, actions, start), start)
        errors[aims] = float((guessed - poses[:, 1:])[:, 10:].square().mean().sqrt())
    assert errors[True] < 0.6 * errors[False], errors


def test_aims_begin_at_rest_where_a_row_begins_and_stay_within_bounds() -> None:
    net = PoseGuess(8, 2, 4, aims=True)
    poses, actions, first = torch.rand(2, 9, 2), 5 + torch.randn(2, 8, 4), torch.tensor([0, 3])
    with torch.no_grad():
        net.gain.weight.fill_(0.05)
    aims = net.aims(poses, actions, first)
    assert torch.equal(aims[0, 0], poses[0, 0]) and torch.equal(aims[1, 3], poses[1, 3])
    assert torch.allclose(aims[1, 4], (poses[1, 3] + actions[1, 3].sum() * 0.05).clamp(max=1.5))
    assert aims[:, -1].max() == 1.5
    assert torch.allclose(net.aims(poses[1:, 3:], actions[1:, 3:], torch.tensor([0]))[0], aims[1, 3:])
