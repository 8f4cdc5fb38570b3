"""What a user can get wrong, each through the command line: exit code 2, no traceback, a message that says what to do,
and nothing half-written."""

import ctypes.util
import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.commands.conftest import HORIZON, Lab, Run, Said, contents, record
from tests.commands.dots import SIZE, WORLD, three_dimensional
from worldline.cli import _claiming
from worldline.data import LeRobotDataset
from worldline.errors import WorldlineError
from worldline.policies import CallablePolicy
from worldline.policies.serve import PolicyServer
from worldline.trainers.inputs import claim_output

RUNNER, IDLER = "tests.commands.dots:runner", "tests.commands.dots:idler"


def refused(said: Said, *expected: str) -> None:
    """The command ended with 2 and a message that holds all of `expected`."""
    words = " ".join(said.err.replace("│", " ").split())
    assert said.code == 2, (said.code, words)
    assert "Traceback" not in said.err
    missing = [text for text in expected if text not in words]
    assert not missing, (missing, words)


@pytest.fixture
def damaged(lab: Lab, tmp_path: Path) -> Path:
    """A private copy of the dataset, to break."""
    return Path(shutil.copytree(lab.data, tmp_path / "damaged"))


def tokenizer(data: object, out: Path, *options: object) -> list[object]:
    return ["train", "tokenizer", "--data", data, "--out", out, "--kind", "patches", *options]


def world_model(lab: Lab, data: object, out: Path, *options: object) -> list[object]:
    small = ["--model.network.width", 32, "--model.network.depth", 1, "--model.network.heads", 2, "--max-steps", 2]
    return [
        "train",
        "world-model",
        "--data",
        data,
        "--tokenizer",
        lab.tok,
        "--out",
        out,
        "--frames",
        4,
        "--model.network.window",
        4,
        *small,
        *options,
    ]


def rank(lab: Lab, out: Path, *policies: object, **changes: object) -> list[object]:
    settings: dict[str, object] = {"world-model": lab.wm, "scorer": lab.scorer, "data": lab.data, "out": out}
    settings |= {"imagined-episodes": 2, "frames": 3} | {k.replace("_", "-"): v for k, v in changes.items()}
    flags = [x for key, value in settings.items() if value is not None for x in (f"--{key}", value)]
    return ["rank", *flags, "--policies", *policies]


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_no_dataset(worldline: Run, tmp_path: Path) -> None:
    refused(worldline(*tokenizer(tmp_path / "nope", tmp_path / "out")), "a LeRobotDataset required", "Correct the path")
    refused(worldline("inspect", tmp_path / "nope", "--out", tmp_path / "out"), "a LeRobotDataset required")
    assert not (tmp_path / "out").exists()


def test_a_refused_command_leaves_the_claim_of_the_run_that_is_there(lab: Lab, tmp_path: Path) -> None:
    """As while another process encodes latents: it has claimed the folder and saved nothing yet."""
    config = Claimer(out=tmp_path / "out", stride=1)
    claim(config)
    with pytest.raises(WorldlineError, match="holds a run with other settings"):
        _claiming(claim, replace(config, stride=3))
    assert (tmp_path / "out" / "training" / "run.json").is_file()
    assert claim(config) == config.out  # and it goes on
    with pytest.raises(WorldlineError, match="nothing to train on"):
        _claiming(broken, replace(config, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()  # its own is taken back


@dataclass(frozen=True, kw_only=True)
class Claimer:
    out: Path
    stride: int


def claim(config: Claimer) -> Path:
    claim_output(config.out, "world-model", config, identity=("stride",))
    return config.out


def broken(config: Claimer) -> Path:
    claim(config)
    raise WorldlineError("nothing to train on")


def test_another_version(damaged: Path, worldline: Run, tmp_path: Path) -> None:
    path = damaged / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codebase_version": "v1.6"}))
    said = worldline(*tokenizer(damaged, tmp_path / "out"))
    refused(said, "codebase_version v2.1 or v3.0 required, got v1.6", "Convert it")
    assert not (tmp_path / "out").exists()


def test_a_truncated_video(
    damaged: Path, lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path / "cache"))  # its latents are cached already
    for path in (damaged / "videos").rglob("*.mp4"):
        path.write_bytes(path.read_bytes()[:3000])
    for command in (tokenizer(damaged, tmp_path / "out"), world_model(lab, damaged, tmp_path / "out")):
        refused(worldline(*command), ".mp4", "frames required", "truncated or damaged", "fetch it again")
        assert not (tmp_path / "out").exists(), "a claim without a run binds the folder to the broken dataset"
    assert worldline(*tokenizer(lab.data, tmp_path / "out")).code == 0


def test_nan_in_the_data(damaged: Path, lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for path in (damaged / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        actions = table["action"].to_pylist()
        actions[5] = [float("nan"), *actions[5][1:]]
        at = table.schema.get_field_index("action")
        table = table.set_column(at, table.schema.field(at), pa.array(actions, table.schema.field(at).type))
        pq.write_table(table, path)
    wrong = ("finite numbers required", "episode 0, column action, row 5", "Leave the episode out")
    refused(worldline(*world_model(lab, damaged, tmp_path / "out")), *wrong)
    assert not (tmp_path / "out").exists()


def test_an_empty_split(worldline: Run, tmp_path: Path) -> None:
    record(tmp_path / "one", 1)
    said = worldline(*tokenizer(tmp_path / "one", tmp_path / "out"))
    refused(said, "the split 'held-out' of 1 episodes is empty", "Record more")
    assert not (tmp_path / "out").exists()


def test_no_such_camera(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    said = worldline(*tokenizer(lab.data, tmp_path / "out", "--cameras", "nope"))
    refused(said, "cameras ['nope'] required, got videos of ['rgb']")
    said = worldline("record", WORLD, "--out", tmp_path / "out", "--cameras", "nope", *HORIZON)
    refused(said, "unknown camera in ['nope']", "cameras: rgb")
    assert not (tmp_path / "out").exists()


def test_no_such_episode(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    imagine = ["imagine", "--world-model", lab.wm, "--data", lab.data, "--episode"]
    refused(worldline(*imagine, 99, "--out", tmp_path / "x.mp4"), "--episode 0 to 19 required", "got 99")
    refused(worldline(*imagine, 0, "--out", tmp_path / "x.gif"), "ending in .mp4 is required", "x.gif")
    refused(worldline(*imagine, 0, "--frames", 1, "--out", tmp_path / "x.mp4"), "--frames: at least 2 required, got 1")
    assert not list(tmp_path.iterdir())


# --- simulators -------------------------------------------------------------------------------------------------------


def test_no_such_task_lists_the_close_ones(worldline: Run, tmp_path: Path) -> None:
    pytest.importorskip("metaworld")
    said = worldline("record", "metaworld/drawer-opne-v3", "--out", tmp_path / "out")
    refused(said, "'drawer-opne-v3'", "did you mean drawer-open-v3")
    refused(worldline("record", "gym/DotWorl-v0", "--out", tmp_path / "out"), "did you mean DotWorld-v0")
    refused(worldline("record", "dots", "--out", tmp_path / "out"), '"metaworld/<task>" or "gym/<environment id>"')
    refused(worldline("record", WORLD, "--policy", "nope", "--out", tmp_path / "out"), "one of mixed", "policy folder")
    refused(worldline("record", WORLD, "--out", tmp_path / "out", "--horizon", 21), "multiple of control_steps")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="headless backends are chosen on Linux only")
def test_no_headless_gl_library(worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("metaworld")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(importlib.import_module("mujoco.gl_context"), "_MUJOCO_GL", "")
    said = worldline("record", "metaworld/drawer-open-v3", "--out", tmp_path / "out")
    refused(said, "neither was found", "apt-get install libosmesa6")
    assert not (tmp_path / "out").exists()


def test_a_recording_that_never_began_binds_nothing(worldline: Run, tmp_path: Path) -> None:
    command = ["record", WORLD, "--out", tmp_path / "out", "--episodes", 1, "--size", SIZE, *HORIZON, "--policy"]
    said = worldline(*command, "tests.commands.dots:three_dimensional")
    refused(said, "episode 0", "required, got (1, 2, 3)")
    assert not (tmp_path / "out").exists()
    assert worldline(*command, RUNNER).code == 0


# --- components that do not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size", 32], "camera rgb: required 64x64, got 32x32"),
        (["--horizon", 20, "--control-steps", 4], "control_steps: required 2, got 4"),
    ],
)
def test_a_dataset_of_another_kind(
    lab: Lab, worldline: Run, tmp_path: Path, options: list[object], expected: str
) -> None:
    record(tmp_path / "data", 2, *options)
    data = tmp_path / "data"
    commands = [
        ["eval", "--world-model", lab.wm, "--data", data, "--out", tmp_path / "out"],
        ["imagine", "--world-model", lab.wm, "--data", data, "--episode", 0, "--out", tmp_path / "out" / "x.mp4"],
        rank(lab, tmp_path / "out", lab.bc, lab.other, data=data),
    ]
    for command in commands:
        refused(worldline(*command), "do not fit", expected, "components made for the same data")
        assert not (tmp_path / "out").exists()
    said = worldline("train", "policy", "--data", lab.data, data, "--out", tmp_path / "out", "--demonstrations", "all")
    refused(said, "datasets", "do not fit")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"names": ["dx"], "low": [-1.0], "high": [1.0]},
            "action.names: required ('action_0', 'action_1'), got ('dx',)",
        ),
        ({"rate_hz": 25.0}, "action.rate_hz: required 20.0, got 25.0"),
        ({"kind": "delta"}, "action.kind: required 'absolute', got 'delta'"),
    ],
)
def test_actions_of_another_kind(
    lab: Lab, damaged: Path, worldline: Run, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    path = damaged / "meta/info.json"
    info = json.loads(path.read_text())
    info["worldline"]["spec"]["action"] |= change
    path.write_text(json.dumps(info))
    said = worldline("eval", "--world-model", lab.wm, "--data", damaged, "--out", tmp_path / "out")
    refused(said, "do not fit", expected)
    assert not (tmp_path / "out").exists()


def test_a_policy_or_scorer_of_another_kind(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    for part, folder in (("policy", lab.bc), ("scorer", lab.scorer)):
        copy = Path(shutil.copytree(folder, tmp_path / part))
        spec = json.loads((copy / "spec.json").read_text())
        spec["cameras"][0] |= {"height": 32, "width": 32}
        (copy / "spec.json").write_text(json.dumps(spec))
        if part == "policy":
            said = worldline(*rank(lab, tmp_path / "out", copy, lab.other))
        else:
            # the encoder's weights do not depend on frames beyond its own working size, the spec alone tells
            said = worldline(*rank(lab, tmp_path / "out", lab.bc, lab.other, scorer=copy))
        assert said.code == 2 and "Traceback" not in said.err
        assert "camera rgb: required 32x32, got 64x64" in said.err or "the weights do not fit the model" in said.err
    hasty = Path(shutil.copytree(lab.scorer, tmp_path / "hasty"))
    spec = json.loads((hasty / "spec.json").read_text()) | {"fps": 2.5}
    (hasty / "spec.json").write_text(json.dumps(spec))
    refused(worldline(*rank(lab, tmp_path / "out", lab.bc, lab.other, scorer=hasty)), "fps: required 2.5, got")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_the_world_model_was_not_trained_with(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(lab.wm, tmp_path / "wm"))
    shutil.rmtree(copy / "tokenizer")
    assert worldline(*tokenizer(lab.data, copy / "tokenizer", "--patch", 16)).code == 0
    said = worldline("eval", "--world-model", copy, "--data", lab.data, "--out", tmp_path / "out")
    refused(said, "required by the world model", "Use the tokenizer saved beside the world model")
    assert not (tmp_path / "out").exists()


def test_weights_to_go_on_from_that_do_not_fit(lab: Lab, damaged: Path, worldline: Run, tmp_path: Path) -> None:
    assert worldline(*tokenizer(lab.data, tmp_path / "tok", "--patch", 16)).code == 0
    go_on = ("--init-from", lab.wm, "--tokenizer")
    said = worldline(*world_model(lab, lab.data, tmp_path / "out", *go_on, tmp_path / "tok"))
    refused(said, "the tokenizer it was trained with is required", f"use --tokenizer {lab.wm}/tokenizer")
    path = damaged / "meta/info.json"
    info = json.loads(path.read_text())
    info["worldline"]["spec"]["action"] |= {"rate_hz": 25.0}
    path.write_text(json.dumps(info))
    said = worldline(*world_model(lab, damaged, tmp_path / "out", *go_on, lab.tok))
    refused(said, "do not fit", "action.rate_hz: required 20.0, got 25.0")
    assert not (tmp_path / "out").exists()


def test_a_latent_cache_of_another_tokenizer(
    lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(lab.root / "cache", tmp_path / "cache"))
    monkeypatch.setenv("WORLDLINE_CACHE", str(cache))
    for path in cache.rglob("cache.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_fingerprint": "0" * 16}))
    said = worldline(*world_model(lab, lab.data, tmp_path / "out"))
    refused(said, "latent cache with tokenizer fingerprint", "got 0000000000000000", "Build a new cache")
    assert not (tmp_path / "out").exists()


# --- folders ----------------------------------------------------------------------------------------------------------


def test_no_such_folder_or_one_of_another_kind(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out, nope = tmp_path / "out", tmp_path / "nope"
    refused(worldline(*rank(lab, out, nope, lab.bc)), "policy required: no folder", "worldline train policy")
    refused(worldline(*rank(lab, out, lab.bc, lab.wm)), "a policy is required here, this is a world-model")
    refused(
        worldline(*rank(lab, out, lab.bc, lab.other, scorer=lab.tok)), "a scorer is required here, this is a tokenizer"
    )
    refused(
        worldline(*rank(lab, out, lab.bc, lab.other, world_model=lab.bc)),
        "a world-model is required here, this is a policy",
    )
    refused(
        worldline(*rank(lab, out, lab.bc, lab.other, scorer=nope)),
        "scorer required: no folder",
        "worldline train scorer",
    )
    refused(worldline(*rank(lab, out, lab.bc, "no_such_module:act")), "a module 'no_such_module' is required")
    refused(worldline(*rank(lab, out, lab.bc, f"{lab.bc}@speed=2")), "noise=NUMBER and lag=STEPS required after '@'")
    said = worldline("train", "world-model", "--data", lab.data, "--tokenizer", lab.wm, "--out", out)
    refused(said, "a tokenizer is required here, this is a world-model")
    said = worldline("offline-rl", "--data", lab.data, "--trajectory-model", nope, "--out", out)
    refused(said, "required")
    refused(worldline("show", nope), "no such folder", "Correct the path")
    refused(worldline("show", lab.data), "That is a dataset", "worldline inspect")
    assert not out.exists()


def test_an_output_folder_that_holds_something_else(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("irreplaceable")
    commands = [
        tokenizer(lab.data, out),
        world_model(lab, lab.data, out),
        ["record", WORLD, "--policy", "random", "--out", out, *HORIZON],
        ["inspect", lab.data, "--out", out],
        ["eval", "--world-model", lab.wm, "--data", lab.data, "--out", out],
        rank(lab, out, lab.bc, lab.other),
        rank(lab, out / "thesis.tex", lab.bc, lab.other),
    ]
    for command in commands:
        said = worldline(*command)
        assert said.code == 2 and "Traceback" not in said.err, said.err
        assert "empty" in said.err and ("holds" in said.err or "is a file" in said.err), said.err
    assert contents(out) == {"thesis.tex": b"irreplaceable"}
    before = contents(lab.bc)
    refused(worldline("train", "policy", "--data", lab.data, "--out", lab.bc, "--kind", "diffusion"), "kind: was 'bc'")
    refused(worldline(*tokenizer(lab.data, lab.bc)), "it holds a policy", "Choose another --out")
    assert contents(lab.bc) == before


def test_a_full_disk(lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = [
        "train",
        "policy",
        "--data",
        lab.data,
        "--out",
        tmp_path / "bc",
        "--max-steps",
        2,
        "--loop.batch-size",
        4,
    ]
    command += ["--policy.encoder.channels", 8, "--policy.encoder.size", 16]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(worldline(*command), "No space left on device", "Free space or choose another --out", "it resumes")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.tmp"))
    assert worldline(*command).code == 0


# --- flags ------------------------------------------------------------------------------------------------------------


def test_unknown_words(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    refused(worldline("trian"), "a verb is required, got 'trian'", "record episodes in a simulator")
    refused(worldline("train", "tokeniser"), "a stage is required after train, got 'tokeniser'", "world-model")
    refused(worldline(*tokenizer(lab.data, tmp_path / "out", "--preset", "huge")), "--preset", "got 'huge'", "tiny")
    refused(worldline(*tokenizer(lab.data, tmp_path / "out", "--spede", 3)), "--spede")
    refused(worldline("train", "tokenizer", "--out", tmp_path / "out"), "--data")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_still_in_training_or_changed_since(
    lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its latents would be another tokenizer's than those that the rest of the training sees."""
    out, half = tmp_path / "wm", Path(shutil.copytree(lab.tok, tmp_path / "half"))
    config = json.loads((half / "config.json").read_text())
    config["provenance"] |= {"steps": 3, "loop": {"steps": 8}}
    (half / "config.json").write_text(json.dumps(config))
    trained = world_model(lab, lab.data, out)
    trained[trained.index(lab.tok)] = half
    refused(worldline(*trained), "a finished tokenizer is required", "step 3 of 8", "--loop.steps 3")
    assert not out.exists()
    assert worldline(*world_model(lab, lab.data, out)).code == 0
    run = out / "training" / "run.json"
    run.write_text(run.read_text().replace(json.loads(run.read_text())["config"]["tokenizer's weights"], "0" * 16))
    refused(worldline(*world_model(lab, lab.data, out)), "tokenizer's weights: was '0000000000000000', is now")


def test_settings_that_cannot_be(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(worldline(*tokenizer(lab.data, out, "--max-steps", 0)), "steps must be at least 1, got 0")
    refused(worldline(*tokenizer(lab.data, out, "--max-steps", "many")), "--loop.steps", "many")
    refused(worldline(*tokenizer(lab.data, out, "--autoencoder.blocks", 8)), "at least two widths")
    refused(
        worldline(*world_model(lab, lab.data, out, "--model.network.heads", 3)),
        "width must be heads times an even number",
    )
    refused(worldline(*world_model(lab, lab.data, out, "--max-episodes", 0)), "max_episodes must be at least 1")
    refused(
        worldline(*world_model(lab, lab.data, out, "--model.network.patch", 3)), "cannot be cut into patches of 3x3"
    )
    refused(worldline(*world_model(lab, lab.data, out, "--frames", 1)), "frames must be at least 2, got 1")
    refused(worldline(*world_model(lab, lab.data, out, "--stride", 0)), "stride must be at least 1, got 0")
    refused(worldline("record", WORLD, "--out", out, "--seed", -1), "--seed: at least 0 required, got -1")
    refused(worldline("inspect", lab.data, "--max-episodes", 0), "--max-episodes: at least 1 required, got 0")
    refused(worldline(*tokenizer(lab.data, out, "--autoencoder.fold", 0)), "fold and latent_channels of at least 1")
    said = worldline("train", "policy", "--data", lab.data, "--out", out, "--policy.kind", "diffusion")
    refused(said, "--kind says what policy it is, got --kind bc and --policy.kind diffusion")
    refused(worldline(*world_model(lab, lab.data, out, "--model.solver-steps", 99)), "which training never shows")
    refused(worldline(*rank(lab, out, lab.bc)), "at least two policies are required", "bc")
    refused(worldline(*rank(lab, out, lab.bc, lab.bc)), "each policy must be named once")
    refused(worldline(*rank(lab, out, lab.bc, lab.other, data=None)), "--truth SIMULATOR or --data DATASET is required")
    refused(worldline(*rank(lab, out, lab.bc, lab.other, episodes=0)), "--episodes: at least 1 required, got 0")
    refused(worldline(*rank(lab, out, lab.bc, lab.other, truth=WORLD, frames=99)), "--frames: at most 81 required")
    refused(
        worldline(*rank(lab, out, lab.bc, lab.other, truth="gym/nope-v0")), "unknown Gymnasium environment 'nope-v0'"
    )
    for count in ("through_tokenizer", "own_actions"):
        refused(worldline(*rank(lab, out, lab.bc, lab.other, **{count: 2})), "--truth and at most the smaller of")
    refused(worldline(*rank(lab, out, lab.bc, lab.other, solver_steps=99)), "which training never shows")
    evaluate = ["eval", "--world-model", lab.wm, "--data", lab.data, "--out", out]
    refused(
        worldline(*evaluate, "--history-level", 0.9), "--history-level: history_level must be a level that training"
    )
    refused(worldline(*evaluate, "--pose-probes", lab.scorer), "probe")
    refused(worldline(*evaluate, "--guidance", 2), "--guidance: guidance=2", "never was trained on (action_dropout=0)")
    refused(worldline(*evaluate, "--hidden", "elbow"), "--hidden: some but not all of", "got elbow")
    refused(
        worldline(*evaluate, "--noisy", "elbow", 0.2), "--noisy: one of", "a positive number required, got elbow 0.2"
    )
    watch = ["imagine", "--world-model", lab.wm, "--data", lab.data, "--episode", 0, "--out", out.with_suffix(".mp4")]
    refused(worldline(*watch, "--actions", "none"), "requires actions: it never learned", "--model.actionless")
    refused(worldline(*watch, "--instruction", "wave"), "trained without instructions", "--model.text hashed")
    wide = world_model(lab, lab.data, out, "--model.network.window", 11)
    refused(worldline(*wide), "clips of at least as many frames as the window", "--frames 4", "window 11")
    recall = world_model(lab, lab.data, out, "--model.network.memory.nearest", 2, "--model.network.depth", 2)
    refused(worldline(*recall), "a memory of 32 frames", "episodes of at least 32 frames, the longest has")
    identity = ["train", "probe", "--target", "identity", "--data", lab.data, "--out", out]
    refused(worldline(*identity), "--target identity reads states of arm/...")
    assert not out.exists()


@pytest.mark.parametrize(
    ("stage", "option", "value", "expected"),
    [
        ("tokenizer", "--patch", 0, "patch of at least 1"),
        ("tokenizer", "--motion-weight", "nan", "motion_weight of at least 0"),
        ("tokenizer", "--loop.lr", "nan", "lr must be at least 0"),
        ("tokenizer", "--loop.ema", 2, "ema in [0, 1)"),
        ("policy", "--episodes", 0, "episodes must be at least 1"),
        ("policy", "--policy.encoder.channels", 7, "channels must be multiples of 8"),
        ("policy", "--policy.encoder.window", 3, "encoder.window must be 1"),
        ("scorer", "--scorer.encoder.window", 0, "window >= 1"),
        ("scorer", "--scorer.persist", 0, "persist and hidden must be at least 1"),
        ("probe", "--columns", "-9", "columns are counted from 0"),
    ],
)
def test_stage_settings_that_cannot_be(
    lab: Lab, worldline: Run, tmp_path: Path, stage: str, option: str, value: object, expected: str
) -> None:
    said = worldline("train", stage, "--data", lab.data, "--out", tmp_path / "out", option, value)
    refused(said, expected, f"worldline train {stage} --help")
    assert not (tmp_path / "out").exists()


# --- served policies --------------------------------------------------------------------------------------------------


def test_a_served_policy_is_ranked_and_its_wrong_answers_are_told(
    lab: Lab, worldline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LeRobotDataset(lab.data).spec
    out = tmp_path / "out"
    with PolicyServer(CallablePolicy.load(RUNNER, spec), name="first") as server:
        url = server.url
        assert worldline(*rank(lab, out, url, IDLER)).code == 0
        kept = set(contents(out / "rollouts"))
        assert worldline(*rank(lab, out, url, IDLER)).code == 0
        assert set(contents(out / "rollouts")) == kept
        port = int(url.rpartition(":")[2])
    with PolicyServer(CallablePolicy.load(IDLER, spec), port=port, name="second"):
        assert worldline(*rank(lab, out, url, IDLER)).code == 0
    new = set(contents(out / "rollouts")) - kept
    assert len(new) == 1, "another policy at the same address is another policy"

    refused(
        worldline(*rank(lab, tmp_path / "gone", url, IDLER)), f"a policy server required at {url}", "Start one there"
    )
    assert not (tmp_path / "gone").exists()

    class Wrong(CallablePolicy):
        def act(self, observation, state, *, seeds):
            return three_dimensional(observation), state

    with PolicyServer(Wrong(three_dimensional, spec), name="wrong") as server:
        said = worldline(*rank(lab, tmp_path / "wrong", server.url, IDLER))
    refused(said, "float32 actions of shape (2, 2, 2)", "got torch.float32 (2, 2, 3)", "Correct the server's hello")
    assert not (tmp_path / "wrong").exists()


# --- pipes ------------------------------------------------------------------------------------------------------------


def test_help_into_a_closed_pipe_is_quiet() -> None:
    program = "from worldline.cli import main; main(['{}', '--help'])"
    for verb in ("show", "record"):
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = subprocess.run(
                [sys.executable, "-c", program.format(verb)],
                stdout=writer,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
            )
        finally:
            os.close(writer)
        assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["train"], ["train", "policy", "--help"], ["rank", "--help"]])
def test_help(worldline: Run, words: list[str]) -> None:
    touched = torch.cuda.is_initialized()
    said = worldline(*words)
    assert said.code == 0 and "usage:" in said.out and torch.cuda.is_initialized() == touched
