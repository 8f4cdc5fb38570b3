"""One training loop for every stage, driven by accelerate: evaluate, save, stop, step, log.

- Data, noise and dropout are functions of (seed, step, rank): the position in training is one integer, and a killed run
  resumes bit for bit.
- Training state (weights, EMA, optimiser) is kept in `training/` beside the published checkpoint, written atomically as
  safetensors and JSON. The published weights are the EMA's.
- A NaN or infinite loss or gradient stops the run before it reaches the weights and names the step; nothing is replaced
  or skipped.
- Ctrl-C saves, then stops. It is held back until the step under way is done, so that what is saved is a whole step.
"""

import hashlib
import importlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from worldline.checkpoint import read_json, read_tensors, write_json, write_tensors
from worldline.errors import CheckpointError, WorldlineError
from worldline.trainers.speed import build_optimizers, compile_network, should_compile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """Length, optimiser and bookkeeping of a training run."""

    steps: int = 1000
    """Optimiser steps in all."""
    batch_size: int = 8
    """Clips (or images) a step and process."""
    accumulate: int = 1
    """Batches summed into one optimiser step."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: PyTorch's Muon for the matrices inside a transformer's blocks, AdamW for the rest (world models only)."""
    muon_lr: float = 4e-3
    """Learning rate of Muon's matrices, scaled to AdamW's size of update."""
    weight_decay: float = 0.01
    """Of AdamW and Muon."""
    warmup: int = 50
    """Steps over which the learning rate rises from 0."""
    cooldown: float = 0.3
    """Last share of the steps over which the learning rate falls to 0 (constant before)."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.995
    """Decay of the averaged weights, which are the ones published. Reached gradually: at step i at most (1+i)/(10+i)."""
    seed: int = 0
    """Decides the first weights, the batches and their noise."""
    save_every: int = 200
    """Steps from one save to the next."""
    eval_every: int = 200
    """Steps from one evaluation on held-out data to the next."""
    wandb: str | None = None
    """Weights & Biases project that mirrors the TensorBoard log, which is always written (OUT/tensorboard)."""
    mixed_precision: str = "auto"
    """auto: bf16 on GPUs that have it, full precision on CPUs. Or no, fp16, bf16."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile the network (world models only). auto: runs of at least 2,000 steps, if a C++ compiler is there."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.lr < math.inf or not 0 <= self.ema < 1:
            raise ValueError(f"lr must be at least 0 and ema in [0, 1), got lr={self.lr} and ema={self.ema}")
        if not self.clip > 0 or self.warmup < 0 or not 0 <= self.cooldown <= 1 or not self.weight_decay >= 0:
            raise ValueError(
                "clip above 0 (the largest gradient norm; a large one clips nothing), warmup of at least 0 steps, cooldown a share from 0 to 1 "
                f"and weight_decay of at least 0 required, got clip={self.clip:g}, warmup={self.warmup}, cooldown={self.cooldown:g} and "
                f"weight_decay={self.weight_decay:g}"
            )
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ValueError("optimizer muon is not made for mixed_precision fp16: use bf16 or no")
        if self.mixed_precision not in ("auto", "no", "fp16", "bf16"):
            raise ValueError(f"mixed_precision must be auto, no, fp16 or bf16, got {self.mixed_precision!r}")


@runtime_checkable
class Stage(Protocol):
    """What the loop needs to know of what it trains."""

    name: str

    @property
    def model(self) -> nn.Module: ...

    def batch(self, seed: int, step: int, size: int) -> Any:
        """The batch of one step: a function of its arguments alone."""
        ...

    def loss(self, model: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]: ...

    def evaluate(self, model: Any) -> Mapping[str, float]: ...

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None: ...


class _Loss(nn.Module):
    """A stage's loss as a module: what distributed wrappers synchronise is a `forward`."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.model = stage.model
        self._stage = (stage,)  # in a tuple: the stage's modules must not be registered twice

    def forward(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self._stage[0].loss(self.model, batch, generator)


def train(stage: Stage, config: LoopConfig, out: Path, *, provenance: Mapping[str, Any], progress: bool = True) -> Path:
    """Train `stage` to `config.steps` and publish it in `out`. Continues from `out/training` if that is there.

    Returns `out`. Raises `CheckpointError` if the state there was made with other settings, `WorldlineError` on NaN.
    """
    AcceleratorState._reset_state()  # another run in this process may have used another precision
    accelerator = Accelerator(
        mixed_precision=_precision(config.mixed_precision),
        # a model without poses or actions holds weights that no loss reaches
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    stage.model.to(device)
    ema = AveragedModel(stage.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=False)
    ema.module.eval()  # it is only ever evaluated and published
    loss_module, *optimizers = accelerator.prepare(_Loss(stage), *build_optimizers(stage.model, config))
    state = out / "training"
    step, seconds = _restore(state, stage, ema, optimizers, config)
    if should_compile(config, device.type):
        compile_network(stage.model)
    if config.wandb and accelerator.is_main_process:
        _mirror_on_wandb(config.wandb, out)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step) if accelerator.is_main_process else None
    if step >= config.steps:
        log.info("%s: already trained for %d steps", out, step)
    bar = tqdm(total=config.steps, initial=step, desc=stage.name, unit="step", disable=not (progress and rank == 0))
    started, metrics, running = time.monotonic() - seconds, {}, None
    saved, whole = step, True

    def save(last: bool) -> None:
        nonlocal saved
        if accelerator.is_main_process and (saved != step or last):
            _store(state, stage, ema, optimizers, config, step, time.monotonic() - started)
            facts = {
                "steps": step,
                "seconds": round(time.monotonic() - started),
                **{k: round(v, 6) for k, v in metrics.items()},
            }
            stage.save(ema.module, out, {**provenance, "loop": asdict(config), **facts})
            saved = step

    try:
        while True:
            # --- evaluate ---------------------------------------------------------------------------------------------
            finished = step >= config.steps
            if step and writer and (step % config.eval_every == 0 or finished):
                metrics = dict(stage.evaluate(ema.module))
                for name, value in metrics.items():
                    writer.add_scalar(f"eval/{name}", value, step)

            # --- save, stop? ------------------------------------------------------------------------------------------
            if finished or (step and step % config.save_every == 0):
                save(last=finished)
            if finished:
                break

            # --- step -------------------------------------------------------------------------------------------------
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * _schedule(step, config)
            stage.model.train()
            loss_module.zero_grad()
            loss, shown = torch.zeros((), device=device), {}
            with _held_back_interrupts():
                for i in range(config.accumulate):
                    draw = (step * config.accumulate + i) * ranks + rank
                    generator = torch.Generator().manual_seed(_mix_seed(config.seed, draw))
                    torch.manual_seed(_mix_seed(config.seed + 1, draw))
                    batch = stage.batch(config.seed, draw, config.batch_size)
                    whole = False  # a forward pass may change buffers
                    # processes exchange gradients once a step, with the last batch
                    with nullcontext() if i == config.accumulate - 1 else accelerator.no_sync(loss_module):
                        with accelerator.autocast():
                            loss, shown = loss_module(batch, generator)
                        _require_finite(loss, "loss", f"{stage.name}, step {step}, rank {rank}", state)
                        accelerator.backward(loss / config.accumulate)
                norm = accelerator.clip_grad_norm_(loss_module.parameters(), config.clip)
                # fp16's scaler meets infinite gradients by design, and skips them
                if accelerator.scaler is None and norm is not None:
                    _require_finite(norm, "gradient norm", f"{stage.name}, step {step}, rank {rank}", state)
                for optimizer in optimizers:
                    optimizer.step()
                step += 1
                _average(ema, stage.model, step, config.ema)
                whole = True

            # --- log --------------------------------------------------------------------------------------------------
            running = loss.detach() if running is None else torch.lerp(running, loss.detach(), 0.05)
            bar.update()
            if writer and (step % 10 == 0 or step == config.steps):
                first = {k: f"{v:.3g}" for k, v in list(metrics.items())[:2]}
                bar.set_postfix({"loss": f"{float(running):.4f}"} | first)
                for name, value in {"loss": loss.detach(), "gradient_norm": norm or 0, **shown}.items():
                    if not math.isnan(value):  # a metric that this batch had nothing for; loss and gradient are checked
                        writer.add_scalar(f"train/{name}", float(value), step)
        accelerator.wait_for_everyone()  # the checkpoint is complete when any process returns
    except KeyboardInterrupt:
        if whole:  # else a second Ctrl-C cut a step in two
            save(last=False)
        log.warning("interrupted; saved at step %d, run the same command again to go on from there", saved)
        raise
    finally:
        bar.close()
        if writer:
            writer.close()
        accelerator.end_training()
    return out


def _require_finite(value: Tensor, what: str, where: str, state: Path) -> None:
    if not torch.isfinite(value):
        raise WorldlineError(
            f"{where}: a finite {what} is required, got {float(value.detach())}. The last good state is in {state}; "
            "look for NaN in the data (`worldline inspect`) or lower --loop.lr."
        )


@contextmanager
def _held_back_interrupts() -> Iterator[None]:
    """Deliver a Ctrl-C after the block, a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    arrived: list[int] = []

    def note(number: int, frame: object) -> None:
        if arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt


def _mirror_on_wandb(project: str, out: Path) -> None:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise WorldlineError(
            f'--loop.wandb needs Weights & Biases, which is not installed: pip install "worldline[wandb]" ({error})'
        ) from error
    # before the writer is made: wandb watches TensorBoard writers created from now on
    wandb.init(
        project=project,
        name=out.name,
        dir=str(out),
        id=hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12],
        resume="allow",
        sync_tensorboard=True,
    )


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _schedule(step: int, config: LoopConfig) -> float:
    """Linear warm-up, constant, linear cool-down."""
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return min(1.0, (step + 1) / max(1, config.warmup), left)


@torch.no_grad()
def _average(ema: AveragedModel, model: nn.Module, step: int, decay: float) -> None:
    """EMA whose decay starts low, so that short runs are not averaged with the initial weights."""
    ema.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    ema.update_parameters(model)  # buffers are copied, not averaged


def _mix_seed(seed: int, draw: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{draw}".encode()).digest()[:7], "big")


# --- training state -------------------------------------------------------------------------------------------------------


def _store(
    state: Path,
    stage: Stage,
    ema: AveragedModel,
    optimizers: Sequence[Any],
    config: LoopConfig,
    step: int,
    seconds: float,
) -> None:
    tensors = {f"model/{k}": v for k, v in stage.model.state_dict().items()}
    tensors |= {f"ema/{k}": v for k, v in ema.module.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{which}/{index}/{name}": torch.as_tensor(value) for name, value in slots.items()}
    # one file holds all that must agree, so a kill between two writes cannot mix two steps
    tensors |= {"step": torch.tensor(step), "seconds": torch.tensor(seconds), "averaged": ema.n_averaged}
    write_json(state / "loop.json", asdict(config))
    write_tensors(state / "state.safetensors", tensors)


def _restore(
    state: Path, stage: Stage, ema: AveragedModel, optimizers: Sequence[Any], config: LoopConfig
) -> tuple[int, float]:
    """Load what `_store` wrote. Only the length and the bookkeeping of a run may change when it goes on."""
    if not (state / "state.safetensors").is_file():
        return 0, 0.0
    before = read_json(state / "loop.json")
    free = {"steps", "save_every", "eval_every", "wandb", "compile"}
    changed = [
        f"  loop.{k}: required {before.get(k)!r}, got {v!r}"
        for k, v in asdict(config).items()
        if k not in free and before.get(k) != v
    ]
    if changed:
        raise CheckpointError(
            f"{state.parent} holds a run with other settings:\n" + "\n".join(changed) + "\nUse those, or another --out."
        )
    tensors = read_tensors(state / "state.safetensors")
    stage.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
    ema.module.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema/")})
    ema.n_averaged.copy_(tensors["averaged"])
    for which, optimizer in enumerate(optimizers):
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{which}/"):
                _, _, index, name = key.split("/")
                slots.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    step = int(tensors["step"])
    log.info("resuming %s at step %d", state.parent, step)
    return step, float(tensors["seconds"])
