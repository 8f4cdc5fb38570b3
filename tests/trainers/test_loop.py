"""The loop every stage shares: bit-exact resume, refusals, full disks, NaN, averaging, schedule."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from worldline import checkpoint
from worldline.errors import CheckpointError, WorldlineError
from worldline.trainers.loop import LoopConfig, _average, _schedule, train

CONFIG = LoopConfig(steps=12, batch_size=16, lr=1e-2, warmup=3, save_every=4, eval_every=6, seed=5)


class Killed(BaseException):
    """Stands for SIGKILL: nothing gets to run after it."""


class ToyStage:
    """A regression with what makes resuming hard: dropout, running statistics, noise from the step's generator."""

    name = "toy"

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.at, self.error, self.drawn = at, error, []
        self.modes: list[bool] = []

    def batch(self, seed, step, size):
        if step == self.at and self.error is not None:
            raise self.error
        self.drawn.append(step)
        x = torch.randn(size, 3, generator=torch.Generator().manual_seed(1000 * seed + step))
        return x, x.sum(1, keepdim=True).sin()

    def loss(self, model, batch, generator):
        noise = 0.01 * torch.randn(batch[1].shape, generator=generator)
        x, y = (t.to(next(model.parameters()).device) for t in (batch[0], batch[1] - noise))
        return (model(x) - y).square().mean(), {}

    def evaluate(self, model):
        self.modes.append(model.training)
        return {"weight": float(model[0].weight.detach().sum())}

    def save(self, model, folder, provenance):
        self.modes.append(model.training)
        facts = {k: v for k, v in provenance.items() if k != "seconds"}
        checkpoint.save_part(
            folder, part="toy", kind="toy", config={}, spec={}, tensors=model.state_dict(), provenance=facts
        )


def go(out: Path, config: LoopConfig = CONFIG, at: int = -1, error: BaseException | None = None) -> ToyStage:
    stage = ToyStage(at, error)
    train(stage, config, out, provenance={}, progress=False)
    return stage


def assert_equal_runs(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "training/state.safetensors"):
        a, b = checkpoint.read_tensors(one / name), checkpoint.read_tensors(other / name)
        assert a.keys() == b.keys()
        different = [k for k in a if k != "seconds" and not torch.equal(a[k], b[k])]
        assert not different, name
    assert checkpoint.read_json(one / "config.json") == checkpoint.read_json(other / "config.json")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    stage = go(out)
    assert stage.drawn == list(range(12))
    assert not any(stage.modes)  # evaluated and published in evaluation mode
    return out


@pytest.mark.parametrize("at", [1, 4, 7, 11])
def test_interrupted_then_resumed_is_bit_exact_and_draws_no_batch_twice(straight, tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", at=at, error=KeyboardInterrupt())
    resumed = go(tmp_path / "run")
    assert resumed.drawn == list(range(at, 12))
    assert_equal_runs(straight, tmp_path / "run")


@pytest.mark.parametrize(("at", "saved"), [(3, 0), (5, 4), (11, 8)])
def test_killed_then_resumed_is_bit_exact_from_the_last_save(straight, tmp_path, at, saved):
    with pytest.raises(Killed):
        go(tmp_path / "run", at=at, error=Killed())
    resumed = go(tmp_path / "run")
    assert resumed.drawn == list(range(saved, 12))
    assert_equal_runs(straight, tmp_path / "run")


def test_ctrl_c_inside_an_update_waits_for_its_end(straight, tmp_path, monkeypatch):
    whole = torch.optim.AdamW.step

    def interrupted(self, *args, **options):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, *args, **options)

    sent: list[bool] = []
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in a shell's background
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    assert int(checkpoint.read_tensors(tmp_path / "run/training/state.safetensors")["step"]) == 1
    go(tmp_path / "run")
    assert_equal_runs(straight, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def test_accumulated_batches_resume_bit_exactly(tmp_path):
    config = replace(CONFIG, accumulate=2, steps=6, save_every=2)
    go(tmp_path / "straight", config)
    with pytest.raises(KeyboardInterrupt):  # between the two batches of step 3: half a step is not saved
        go(tmp_path / "run", config, at=7, error=KeyboardInterrupt())
    assert go(tmp_path / "run", config).drawn == list(range(4, 12))
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_a_finished_run_stays_as_it_is_and_a_longer_one_goes_on(straight, tmp_path):
    go(tmp_path / "run")
    assert go(tmp_path / "run").drawn == []
    assert_equal_runs(straight, tmp_path / "run")
    assert go(tmp_path / "run", replace(CONFIG, steps=14, save_every=100)).drawn == [12, 13]


def test_other_settings_are_refused_field_by_field(straight):
    with pytest.raises(CheckpointError, match=r"loop\.batch_size: required 16, got 8\n  loop\.lr: required 0\.01"):
        go(straight, replace(CONFIG, batch_size=8, lr=0.1))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_with_the_step_named_and_corrupts_nothing(tmp_path, poison):
    class Poisoned(ToyStage):
        def loss(self, model, batch, generator):
            loss, _ = super().loss(model, batch, generator)
            if self.drawn[-1] == 7:  # the step after it would save
                bad = loss * float("nan")
                # sqrt at 0: a finite value with an infinite slope, and 0 * infinity is NaN
                loss = bad if poison == "loss" else loss + (model[0].weight.sum() * 0).sqrt()
            return loss, {}

    out = tmp_path / "run"
    with pytest.raises(WorldlineError, match=r"toy, step 7, rank 0: a finite .* is required, got (nan|inf)"):
        train(Poisoned(), CONFIG, out, provenance={}, progress=False)
    for name in ("model.safetensors", "training/state.safetensors"):
        tensors = checkpoint.read_tensors(out / name)
        assert all(torch.isfinite(t.float()).all() for t in tensors.values())
    assert int(checkpoint.read_tensors(out / "training/state.safetensors")["step"]) == 4
    assert checkpoint.load_config(out, part="toy")["provenance"]["steps"] == 4


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("file", ["state.safetensors", "model.safetensors", "spec.json", "config.json"])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(straight, tmp_path, monkeypatch, call, file):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        go(out, at=5, error=Killed())
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")} | {p: p.read_bytes() for p in out.glob("*.json")}
    real = getattr(os, call)

    def full(*arguments):
        name = os.readlink(f"/proc/self/fd/{arguments[0]}") if call == "fsync" else str(arguments[0])
        if f".{file}." in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match=r"could not be written \(No space left on device\); nothing was"):
            go(out)
    published = {p: content for p, content in before.items() if "training" not in p.parts}
    if call == "fsync":  # space runs out while writing, before anything is renamed
        assert all(p.read_bytes() == content for p, content in published.items())
    if file == "state.safetensors":
        assert all(p.read_bytes() == content for p, content in before.items())
    assert not list(out.rglob("*.tmp"))
    go(out)
    assert_equal_runs(straight, out)


def test_a_folder_that_cannot_be_written_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.write_json(tmp_path / "file" / "run.json", {})


def test_tensors_that_share_memory_are_saved(tmp_path):
    tied = nn.Linear(3, 3)
    whole = torch.arange(6.0)
    tensors = {"a": tied.weight, "b": tied.weight, "c": whole, "d": whole[2:], "e": whole.expand(2, 6)}
    checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    read = checkpoint.read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(read[k], v.detach()) for k, v in tensors.items())


def test_schedule_rises_holds_and_falls_to_nearly_zero():
    config = LoopConfig(steps=100, warmup=10, cooldown=0.3)
    rates = [_schedule(i, config) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:70] == [1.0] * 61
    assert all(a > b for a, b in zip(rates[70:], rates[71:]))
    assert rates[-1] == pytest.approx(1 / 30)
    assert all(rate > 0 for rate in rates)
    assert [_schedule(i, LoopConfig(steps=5, warmup=0, cooldown=0.0)) for i in range(5)] == [1.0] * 5


def test_average_forgets_the_start_and_settles_at_its_decay():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(100.0)
    ema = torch.optim.swa_utils.AveragedModel(model)
    expected = None
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        _average(ema, model, step, 0.9)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = step if expected is None else decay * expected + (1 - decay) * step
        assert float(ema.module.weight.detach()) == pytest.approx(expected, rel=1e-5)
    # a ramp seen through a decay of 0.9 lags by 9 steps; nothing is left of the 100 it was built with
    assert float(ema.module.weight.detach()) == pytest.approx(199 - 9, abs=0.01)


def test_runs_of_different_precision_follow_each_other_in_one_process(tmp_path):
    go(tmp_path / "full", replace(CONFIG, steps=2, mixed_precision="no"))
    go(tmp_path / "half", replace(CONFIG, steps=2, mixed_precision="bf16"))
    go(tmp_path / "again", replace(CONFIG, steps=2, mixed_precision="no"))
    assert_equal_runs(tmp_path / "full", tmp_path / "again")
    full, half = (checkpoint.read_tensors(tmp_path / n / "model.safetensors")["0.weight"] for n in ("full", "half"))
    assert not torch.equal(full, half)


@pytest.mark.parametrize("change", [{"steps": 0}, {"accumulate": 0}, {"mixed_precision": "fp8"}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        LoopConfig(**change)


@pytest.mark.parametrize(
    "change", [{"clip": -1.0}, {"clip": 0.0}, {"warmup": -5}, {"cooldown": 3.0}, {"weight_decay": -0.1}]
)
def test_settings_that_would_climb_instead_of_descend_are_refused(change):
    """A negative norm to clip to turned every gradient round, and the run ended without a word."""
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"required, got.*{name}={value:g}"):
        LoopConfig(**change)
