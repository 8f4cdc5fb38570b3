"""Where a policy that is loaded for use is put: on the GPU if there is one, all of it."""

import pytest
import torch
from torch import nn

from tests.oracles import SPEC, dot_tokenizer
from tests.policies.dots import small_policy, starts
from tests.worldmodels.test_video_action import build
from worldline.policies import SteeredPolicy, VideoActionPolicy, load_policy


@pytest.fixture
def moved(monkeypatch) -> list[tuple[nn.Module, str]]:
    """Modules, and where they were sent, as if torch found a GPU."""
    sent: list[tuple[nn.Module, str]] = []

    def to(module: nn.Module, device: str | None = None, **_: object) -> nn.Module:
        if device is not None:  # not the layout in memory alone
            sent.append((module, device))
        return module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "to", to)
    return sent


@pytest.mark.parametrize("kind", ["bc", "steered", "unified"])
def test_a_policy_is_used_on_the_gpu_where_there_is_one(kind, moved, tmp_path) -> None:
    if kind == "unified":
        model = build("uwm")
        model.save_pretrained(tmp_path)
        dot_tokenizer().save_pretrained(tmp_path / "tokenizer")
    else:
        policy = small_policy("bc") if kind == "bc" else SteeredPolicy(small_policy("diffusion"))
        policy.save_pretrained(tmp_path)
    loaded = load_policy(f"{tmp_path}@noise=0.1", spec=SPEC).policy
    assert moved == [(loaded, "cuda")]
    assert not isinstance(loaded, VideoActionPolicy) or loaded.tokenizer in loaded.modules()
    moved.clear()
    load_policy(str(tmp_path), spec=SPEC, device="cpu")  # `record` asks for that in its workers
    assert [device for _, device in moved] == ["cpu"]
    assert loaded.act(starts(2), loaded.reset(2), seeds=torch.arange(2))[0].device.type == "cpu"
