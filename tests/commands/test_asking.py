"""Flags of `imagine --mode`: each does something, or is refused."""

from pathlib import Path

import pytest

from tests.oracles import dot_tokenizer
from tests.trainers.toy import write_dots
from tests.worldmodels.test_video_action import build, scrambled
from worldline.commands.dreaming import Imagine, run_imagine
from worldline.diffusion import LevelDistribution
from worldline.errors import WorldlineError

HALF = LevelDistribution(clean=0.1, pure=0.5, low=0.4)  # of actions training shows no level below 0.4


@pytest.fixture(scope="module")
def va(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("va")
    scrambled(build("uwm", action_levels=HALF, action_steps=1)).save_pretrained(out)
    dot_tokenizer().save_pretrained(out / "tokenizer")
    return out


@pytest.mark.parametrize("mode", ["policy", "joint"])
def test_actions_are_found_in_as_many_solver_steps_as_asked_for(mode, va, tmp_path) -> None:
    data = write_dots(tmp_path / "data", episodes=3)

    def plot(steps: int | None) -> bytes:
        out = tmp_path / "o.mp4"
        run_imagine(
            Imagine(world_model=va, data=data, episode=0, mode=mode, solver_steps=steps, frames=4, out=out),  # type: ignore
            progress=False,
        )
        return out.with_suffix(".png").read_bytes()

    own, one, two = plot(None), plot(1), plot(2)
    assert own == one and one != two
    with pytest.raises(
        WorldlineError, match=r"--solver-steps: action_steps=4 asks for level 0\.25, which training never shows"
    ):
        plot(4)


def test_actions_that_no_dream_is_given_are_refused() -> None:
    about = {"world_model": Path("va"), "data": Path("data"), "episode": 0}
    with pytest.raises(ValueError, match=r"--actions is for --mode forward.* got --actions negated and --mode policy"):
        Imagine(**about, mode="policy", actions="negated")
