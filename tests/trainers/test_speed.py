"""Muon takes the matrices it is made for, AdamW all the rest; long runs are compiled (bench_train.py checks parity)."""

import inspect
import shutil
from dataclasses import replace

import pytest
import torch

from tests.oracles import SPEC, dot_clip, dot_tokenizer, encoded
from tests.trainers.test_loop import CONFIG, ToyStage
from tests.worldmodels.test_video_action import build
from worldline.data.normalization import RobustNormalizer
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.speed import FastTraining, build_optimizers, compile_network, should_compile
from worldline.worldmodels import AutoregressiveConfig, AutoregressiveWorldModel, TransformerConfig

TOKENIZER = dot_tokenizer()


@pytest.fixture
def model() -> AutoregressiveWorldModel:
    torch.manual_seed(0)
    clip = dot_clip(64, 4, seed=0)
    return AutoregressiveWorldModel(
        AutoregressiveConfig(network=TransformerConfig(width=32, depth=1, heads=2, window=3)),
        replace(SPEC, latent=TOKENIZER.latent_spec),
        action_normalizer=RobustNormalizer.fit(clip.actions.flatten(0, 2)),
        pose_normalizer=RobustNormalizer.fit(clip.poses.flatten(0, 1)),
    )


def test_every_weight_is_trained_once_and_muon_sees_only_hidden_matrices(model):
    adamw, muon = build_optimizers(model, LoopConfig(optimizer="muon"))
    of = [[p for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    together = [id(p) for params in of for p in params]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in of[1]}
    assert all(name.startswith("network.blocks.") and name.endswith(".weight") for name in matrices)
    assert {"network.blocks.0.mlp.up.weight", "network.blocks.0.time_out.weight"} <= matrices


def test_what_muon_asks_for_is_seen_by_isinstance_of_every_python(model):
    """From 3.12 on `isinstance` looks a protocol's members up statically, where a module's submodules are not found."""
    members = [name for name in vars(FastTraining) if not name.startswith("_")]
    assert members == ["hidden_matrices"] and inspect.getattr_static(model, members[0])
    with pytest.raises(AttributeError):
        inspect.getattr_static(model, "network")


def test_a_muon_step_turns_every_direction_alike(model):
    """The update of a hidden matrix has singular values near one another, however uneven the gradient's are."""
    config = LoopConfig(optimizer="muon", weight_decay=0.0)
    optimizers = build_optimizers(model, config)
    name = "network.blocks.0.mlp.up.weight"
    weight = dict(model.named_parameters())[name]
    for _ in range(2):  # heads begin at zero: the first step's gradient reaches them alone
        before = weight.detach().clone()
        model.zero_grad()
        loss, _ = model.loss(encoded(dot_clip(16, 4, seed=1), TOKENIZER), torch.Generator().manual_seed(0))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    uneven = torch.linalg.svdvals(weight.grad)
    step = torch.linalg.svdvals(weight.detach() - before)
    # the iteration stops at values between 0.7 and 1.2 times their mean, and lifts the smallest ones last
    assert step.max() / step.median() < 2 < uneven.max() / uneven.median()


def test_muon_asks_for_a_model_that_names_its_matrices(tmp_path):
    config = LoopConfig(steps=2, optimizer="muon")
    with pytest.raises(ValueError, match=r"hidden_matrices\), got Sequential: use adamw"):
        train(ToyStage(), config, tmp_path / "run", provenance={}, progress=False)
    with pytest.raises(ValueError, match="not made for mixed_precision fp16"):
        LoopConfig(optimizer="muon", mixed_precision="fp16")


def test_only_long_runs_are_compiled_unless_asked(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert should_compile(LoopConfig(steps=5000), "cpu") and not should_compile(CONFIG, "cpu")
    assert should_compile(LoopConfig(steps=5, compile="yes"), "cpu")
    assert not should_compile(LoopConfig(steps=5000, compile="no"), "cpu")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not should_compile(LoopConfig(steps=5000), "cpu") and should_compile(LoopConfig(steps=5000), "cuda")


def test_only_networks_that_are_called_as_one_are_compiled(model, caplog):
    compile_network(model)
    assert model.network._compiled_call_impl is not None
    unified = build("uwm")
    with caplog.at_level("INFO"):
        compile_network(unified)
    assert unified.network._compiled_call_impl is None and "not compiled" in caplog.text
