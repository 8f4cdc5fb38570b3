"""The stage for several robots: what it measures, refuses, and that a run goes on bit for bit."""

import re
from pathlib import Path

import pytest
import torch

from tests.robots import DOTS, TRIPOD, write_cables
from worldline import checkpoint
from worldline.errors import CheckpointError, DatasetError, SpecMismatch
from worldline.tokenizers import load_tokenizer
from worldline.trainers import tokenizer, world_models
from worldline.trainers.loop import LoopConfig
from worldline.types import Clip
from worldline.worldmodels import AutoregressiveConfig, MultiWorldModel, TransformerConfig, load_world_model

NETWORK = TransformerConfig(width=16, depth=1, heads=2, window=3, guess_width=8, experts=3)


@pytest.fixture(scope="module")
def cables(tmp_path_factory) -> Path:
    return write_cables(tmp_path_factory.mktemp("data") / "cables", episodes=12)


@pytest.fixture(scope="module")
def eyes(cables, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "cables"
    return tokenizer.run(tokenizer.TrainTokenizer(data=(cables,), out=out, kind="patches", patch=4), progress=False)


def config_of(data: tuple, tokenizers: tuple, out: Path, **options) -> world_models.TrainWorldModels:
    loop = {"steps": 6, "batch_size": 4, "lr": 3e-3, "warmup": 1, "save_every": 2, "eval_every": 6, "optimizer": "muon"}
    loop |= options.pop("loop", {})
    model = AutoregressiveConfig(network=options.pop("network", NETWORK))
    return world_models.TrainWorldModels(
        data=data, tokenizer=tokenizers, out=out, frames=5, model=model, loop=LoopConfig(**loop), **options
    )


@pytest.fixture(scope="module")
def trained(dots, cables, patches, eyes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("multi") / "multi"
    return world_models.run(config_of((dots, cables), (patches, eyes), out, balance=True), progress=False)


def test_each_robot_is_measured_and_so_is_the_routing(trained, dots, cables, patches):
    facts = checkpoint.load_config(trained, part="world-models")["provenance"]
    for name in (DOTS, TRIPOD):
        assert facts[f"error_vs_copy/{name}"] > 0 and facts[f"shuffled_vs_true/{name}"] > 0
        assert 0 <= facts[f"routing_entropy/{name}"] <= torch.tensor(3.0).log() + 1e-5
        assert sum(facts[f"expert_load/{name}/{i}"] for i in range(3)) == pytest.approx(1, abs=1e-4)
    assert facts["routing_information"] >= 0 and facts["embodiments"] == [DOTS, TRIPOD]
    model, beside = load_world_model(trained / "members" / DOTS)
    assert model.latent_spec == beside.latent_spec == load_tokenizer(patches).latent_spec
    assert facts["weights"] == sum(p.numel() for p in MultiWorldModel.from_pretrained(trained).parameters())
    own = checkpoint.load_config(trained / "members/cables-v1.0", part="world-model")["provenance"]
    assert own["data"] == [str(cables)]
    assert (trained / "members/cables-v1.0" / own["data_from_here"][0]).resolve() == cables.resolve()


def test_interrupted_and_resumed_is_bit_exact(trained, dots, cables, patches, eyes, tmp_path, monkeypatch):
    whole = world_models._WorldModelsStage.batch

    def interrupted(self, seed, step, size):
        if step == 3:
            raise KeyboardInterrupt
        return whole(self, seed, step, size)

    config = config_of((dots, cables), (patches, eyes), tmp_path / "resumed", balance=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world_models._WorldModelsStage, "batch", interrupted)
        world_models.run(config, progress=False)
    world_models.run(config, progress=False)
    for name in ("model.safetensors", "training/state.safetensors"):
        a, b = checkpoint.read_tensors(trained / name), checkpoint.read_tensors(tmp_path / "resumed" / name)
        assert [k for k in a if k != "seconds" and not torch.equal(a[k], b[k])] == []
        loads = next(z for k, z in a.items() if k.endswith("experts.loads"))
        assert torch.allclose(loads.sum(1), torch.ones(2))  # both were trained on, and it is remembered


class Nothing:
    """Stands for batches: which embodiment is drawn does not depend on them."""

    def batch(self, seed: int, step: int, size: int) -> Clip:
        return Clip(frames={}, poses=torch.zeros(1, 1, 0), actions=torch.zeros(1, 0, 1, 1))


def test_embodiments_are_drawn_by_their_frames_or_evenly(dots, cables):
    groups = world_models._by_embodiment((dots, cables, dots))
    assert groups == {DOTS: [dots, dots], TRIPOD: [cables]}
    chosen = [world_models.open_datasets(roots, "train") for roots in groups.values()]
    frames = [sum(s.dataset.length(i) for s in selections for i in s.episodes) for selections in chosen]
    stage = object.__new__(world_models._WorldModelsStage)
    stage.batches = dict.fromkeys(groups, Nothing())
    for balance, expected in ((False, frames[0] / sum(frames)), (True, 0.5)):
        stage.shares = world_models._shares(chosen, balance=balance)
        drawn = [next(iter(stage.batch(0, step, 4))) for step in range(600)]
        assert drawn.count(DOTS) / 600 == pytest.approx(expected, abs=0.07)
        assert drawn == [next(iter(stage.batch(0, step, 4))) for step in range(600)]
        assert drawn != [next(iter(stage.batch(1, step, 4))) for step in range(600)]


def test_inputs_that_do_not_fit_are_told_before_anything_is_encoded(
    dots, cables, patches, eyes, trained, tmp_path, monkeypatch
):
    def encode(*arguments, **options):
        raise AssertionError("encoded")

    monkeypatch.setattr("worldline.trainers.inputs.LatentCache.build", encode)
    wrong = {
        r"one folder for each of these 2 embodiments, .* got 3:\n  dot: .*\n  cables/v1.0: ": (patches, eyes, eyes),
        r"tokenizer .* does not fit .* \(embodiment dot\):\n  camera front.b: required 16x16, got none": (
            eyes,
            patches,
        ),
        r"\(embodiment cables/v1.0\):\n  camera top: required 16x16, got none": (patches,),
    }
    for message, tokenizers in wrong.items():
        with pytest.raises(SpecMismatch, match=message):
            world_models.run(config_of((dots, cables), tokenizers, tmp_path / "no"), progress=False)
    with pytest.raises(SpecMismatch, match="at least one dataset folder is required"):
        world_models.run(config_of((), (patches,), tmp_path / "no"), progress=False)
    with pytest.raises(DatasetError):
        world_models.run(config_of((tmp_path / "nowhere",), (patches,), tmp_path / "no"), progress=False)
    assert not (tmp_path / "no").exists()
    with pytest.raises(CheckpointError, match=re.escape("balance: was True, is now False")):
        world_models.run(config_of((dots, cables), (patches, eyes), trained), progress=False)
    with pytest.raises(ValueError, match="frames must be at least 2"):
        world_models.TrainWorldModels(data=(dots,), tokenizer=(patches,), out=tmp_path / "no", frames=1)


def test_presets_are_those_of_one_robot_with_experts():
    for name, (_, settings) in world_models.PRESETS.items():
        assert settings["model"].network.experts == 4, name
