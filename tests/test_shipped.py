"""The shipped world model is small and works: in it the expert's actions open the drawer, none or the reverse do not."""

from pathlib import Path

import pytest
import torch

from worldline.rl_in_imagination import Dream, SuccessScorer
from worldline.sim import make_world
from worldline.sim.base import SimFrame, observation
from worldline.sim.metaworld import expert
from worldline.worldmodels import load_world_model

TASK = "drawer-open-v3"
SHIPPED = Path(__file__).parents[1] / "checkpoints" / TASK
FRAMES = 30


def test_only_what_is_needed_is_shipped() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"README.md", "config.json", "spec.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in files) <= 20e6


@pytest.fixture(scope="module")
def expert_episodes() -> tuple[list[list[SimFrame]], torch.Tensor]:
    """Frames of three episodes of the scripted expert and its actions "n t k a", from starts no training saw."""
    world = make_world(f"metaworld/{TASK}")
    episodes, actions = [], []
    for seed in range(10_000, 10_003):
        frames, blocks, controller, opened = [world.reset(seed)], [], expert(TASK), False
        for _ in range(FRAMES):
            step = world.drive(controller)
            frames.append(step.frame)
            blocks.append(step.consumed)
            opened |= bool(step.success)
        assert opened, "the expert opens the drawer in these frames"
        episodes.append(frames)
        actions.append(torch.stack(blocks))
    world.close()
    return episodes, torch.stack(actions)


def test_the_experts_actions_open_the_drawer_and_none_or_the_reverse_do_not(expert_episodes) -> None:
    model, tokenizer = load_world_model(SHIPPED / "world-model")
    scorer = SuccessScorer.from_pretrained(SHIPPED / "scorer")
    episodes, actions = expert_episodes
    n = len(episodes)
    first = observation([frames[0] for frames in episodes], [""] * n)
    last = {camera: torch.stack([f[-1].images[camera] for f in episodes]) for camera in first.images}
    dream = Dream(model, tokenizer)

    def play(blocks: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The last frame, and the scorer's logit for it."""
        state, memory = dream.start(first, seeds=torch.arange(n)), scorer.reset(n)
        memory, score = scorer.step(memory, state.observation, None)
        for t in range(FRAMES):
            state = dream.step(state, blocks[:, t])
            memory, score = scorer.step(memory, state.observation, blocks[:, t])
        return dict(state.observation.images), torch.logit(score.success, eps=1e-6)

    opened, success = play(actions)
    _, still = play(torch.zeros_like(actions))
    _, reversed_success = play(-actions)
    assert (success > still + 3).all() and (success > reversed_success + 3).all(), (success, still, reversed_success)

    for camera, truth in last.items():
        moved = (truth.float() - first.images[camera].float()).abs().amax(1, keepdim=True) > 24
        imagined = ((opened[camera].float() - truth.float()) * moved).square().mean()
        repeated = ((first.images[camera].float() - truth.float()) * moved).square().mean()
        assert imagined < repeated / 2, (camera, imagined, repeated)
