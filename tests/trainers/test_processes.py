"""Two processes on CPUs train what one process trains with twice the batches, and stay in step with each other."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.test_stages import loop, world_model_config
from tests.trainers.test_video_action import config as video_action_config
from worldline import checkpoint
from worldline.trainers import video_action, world_model

PROGRAM = """
import os, pathlib, sys
from tests.trainers.test_processes import config, run_and_keep_model
from worldline.checkpoint import write_tensors
kind, (dots, patches, out) = sys.argv[1], map(pathlib.Path, sys.argv[2:])
model = run_and_keep_model(kind, config(kind, dots, patches, out / "run"))
assert (out / "run" / "model.safetensors").is_file()  # published when any process returns
write_tensors(out / f"rank{os.environ['RANK']}.safetensors", model.state_dict())
"""


def config(kind: str, dots: Path, patches: Path, out: Path, **options) -> Any:
    if kind == "world-model":
        return world_model_config(dots, patches, out, loop=loop(4, batch_size=4, warmup=1, cooldown=0.0, **options))
    settings = {"batch_size": 4, "warmup": 1, "cooldown": 0.0} | options
    return video_action_config(dots, patches, out, design=kind, loop=settings)


def run_and_keep_model(kind: str, settings: Any) -> torch.nn.Module:
    """Run the stage; return the model as this process trained it, not the average that is published."""
    stages = world_model if kind == "world-model" else video_action
    kept = []
    whole = stages.train

    def spy(stage, *arguments, **options):
        kept.append(stage.model)
        return whole(stage, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", spy)
        stages.run(settings, progress=False)
    return kept[0]


@pytest.mark.parametrize("kind", ["world-model", "uwm", "uva"])
def test_two_processes_equal_one_with_the_same_batches(kind, dots, patches, tmp_path):
    # `accelerate launch` itself starts several processes on CPUs only through MPI
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "program.py"]
    root = Path(__file__).parents[2]
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [*command, kind, str(dots), str(patches), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [checkpoint.read_tensors(tmp_path / f"rank{i}.safetensors") for i in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])

    def trained(name: str, **options) -> dict[str, torch.Tensor]:
        return run_and_keep_model(kind, config(kind, dots, patches, tmp_path / name, **options)).state_dict()

    still = replace(config(kind, dots, patches, tmp_path / "start"), loop=loop(1, lr=0.0))
    start = run_and_keep_model(kind, still).state_dict()
    alone, other = trained("alone", accumulate=2), trained("other")

    def distance(a, b) -> float:
        return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())

    moved = distance(alone, start)
    assert distance(ranks[0], alone) < 1e-2 * moved
    assert distance(other, alone) > 0.1 * moved  # half of the batches lead elsewhere: the comparison can fail
