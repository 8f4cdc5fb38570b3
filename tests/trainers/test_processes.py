"""Two processes on CPUs train what one process trains with twice the batches, and stay in step with each other."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainers.test_stages import loop, world_model_config
from worldline import checkpoint
from worldline.trainers import world_model

PROGRAM = """
import os, pathlib, sys
from tests.trainers.test_processes import config, run_and_keep_model
from worldline.checkpoint import write_tensors
dots, patches, out = map(pathlib.Path, sys.argv[1:])
model = run_and_keep_model(config(dots, patches, out / "run"))
assert (out / "run" / "model.safetensors").is_file()  # published when any process returns
write_tensors(out / f"rank{os.environ['RANK']}.safetensors", model.state_dict())
"""


def config(dots: Path, patches: Path, out: Path, **options) -> world_model.TrainWorldModel:
    return world_model_config(dots, patches, out, loop=loop(4, batch_size=4, warmup=1, cooldown=0.0, **options))


def run_and_keep_model(settings: world_model.TrainWorldModel) -> torch.nn.Module:
    """Run the stage; return the model as this process trained it, not the average that is published."""
    kept = []
    whole = world_model.train

    def spy(stage, *arguments, **options):
        kept.append(stage.model)
        return whole(stage, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_model, "train", spy)
        world_model.run(settings, progress=False)
    return kept[0]


def test_two_processes_equal_one_with_the_same_batches(dots, patches, tmp_path):
    # `accelerate launch` itself starts several processes on CPUs only through MPI
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "program.py"]
    root = Path(__file__).parents[2]
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, str(dots), str(patches), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [checkpoint.read_tensors(tmp_path / f"rank{i}.safetensors") for i in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])

    start = run_and_keep_model(replace(config(dots, patches, tmp_path / "start"), loop=loop(1, lr=0.0))).state_dict()
    alone = run_and_keep_model(config(dots, patches, tmp_path / "alone", accumulate=2)).state_dict()
    other = run_and_keep_model(config(dots, patches, tmp_path / "other")).state_dict()

    def distance(a, b) -> float:
        return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())

    moved = distance(alone, start)
    assert distance(ranks[0], alone) < 1e-2 * moved
    assert distance(other, alone) > 0.1 * moved  # half of the batches lead elsewhere: the comparison can fail
