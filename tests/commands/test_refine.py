"""`worldline refine` through the command line: a policy folder with a report, judged in the simulator on request."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

from tests.commands.conftest import Lab, Run
from tests.commands.dots import WORLD
from tests.commands.test_all_verbs import results
from worldline import cli
from worldline.checkpoint import load_config, read_tensors, write_tensors
from worldline.commands.refining import Refine
from worldline.rl_in_imagination.ppo import PPOConfig
from worldline.trainers.refinement import RefineSettings

SMALL = [
    "--rl.rows", 4, "--rl.frames", 5, "--rl.check-every", 1, "--rl.check-episodes", 4, "--rl.critic-first", 0,
    "--rl.ppo.epochs", 1, "--override-audit", True,
]  # fmt: skip


def command(lab: Lab, policy: Path, out: Path, *more: object) -> list[object]:
    judges = ["--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data]
    return ["refine", "--policy", policy, *judges, "--out", out, *SMALL, *more]


def test_refined_policies_rank_and_refine_like_any_other(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out = tmp_path / "refined"
    truth = ["--truth", WORLD, "--truth-episodes", 2, "--processes", 0]
    said = worldline(*command(lab, lab.bc, out, "--rl.iterations", 2, "--videos", 1, *truth))
    assert said.code == 0 and "report.html" in said.out, said.err
    found = results(out)
    assert [c["iteration"] for c in found["checks"]] == [0, 1, 2] and len(found["history"]) == 2
    assert found["frozen"].keys() == {"world_model", "tokenizer", "scorer"}
    rows = found["truth"]["checked"]
    assert [r["iteration"] for r in rows] == [0, 1, 2] and all(
        0 <= r["called_success"] <= r["failures"] <= 2 for r in rows
    )
    assert found["truth"]["gain_interval"][0] <= found["truth"]["gain"] <= found["truth"]["gain_interval"][1]
    assert found["replayed"]["called_success"] <= found["replayed"]["failures"]
    made = load_config(out, part="policy")["provenance"]
    assert made["refined_from"] == str(lab.bc) and made["iteration"] == found["best_iteration"]
    words = shlex.split(json.loads((out / "report.json").read_text())["command"])
    assert words[:2] == ["worldline", "refine"] and words[words.index("--rl.rows") + 1] == "4"
    assert cli._parse(Refine, "refine", words[2:]).rl == replace(
        RefineSettings(),
        rows=4,
        frames=5,
        check_every=1,
        check_episodes=4,
        critic_first=0,
        iterations=2,
        ppo=PPOConfig(epochs=1),
    )  # the page's command is the command
    warned = json.loads((out / "report.json").read_text())["warnings"]
    assert any("failed its audit" in w for w in warned) == bool(found["audit_failures"])

    before = (out / "training" / "state.safetensors").read_bytes()
    assert worldline(*command(lab, lab.bc, out, "--rl.iterations", 2, "--videos", 1)).code == 0  # nothing left to do
    assert (out / "training" / "state.safetensors").read_bytes() == before
    judges = ["--world-model", lab.wm, "--scorer", lab.scorer, "--data", lab.data]
    ranking = ["rank", *judges, "--policies", lab.bc, out, "--imagined-episodes", 4, "--frames", 5, "--videos", 0]
    assert worldline(*ranking, "--out", tmp_path / "rank").code == 0
    assert worldline(*command(lab, out, tmp_path / "more", "--rl.iterations", 1, "--videos", 0)).code == 0


def test_grpo_and_diffusion_policies(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    grpo = ["--rl.ppo.algorithm", "grpo", "--rl.ppo.group", 2, "--rl.iterations", 1, "--videos", 0, "--doubt-steps", 2]
    assert worldline(*command(lab, lab.diffusion, tmp_path / "steered", *grpo)).code == 0
    assert load_config(tmp_path / "steered", part="policy")["kind"] == "steered"
    found = results(tmp_path / "steered", videos=False)
    assert "value_error" not in found["history"][0] and found["doubt"]["limit"] > 0
    assert worldline("show", tmp_path / "steered").code == 0


def test_a_second_world_model_decides(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "asked"
    shutil.copytree(lab.wm, other)
    tensors = read_tensors(other / "model.safetensors")
    write_tensors(other / "model.safetensors", {k: v * 1.1 if v.is_floating_point() else v for k, v in tensors.items()})
    truth = ["--truth", WORLD, "--truth-episodes", 2, "--processes", 0, "--videos", 0, "--rl.iterations", 1]
    said = worldline(*command(lab, lab.bc, out, "--check-world-model", other, *truth))
    assert said.code == 0, said.err
    found = results(out, videos=False)
    assert all(0 <= c["second_low"] <= c["second_success"] <= c["second_high"] <= 1 for c in found["checks"])
    assert found["second"]["replayed"]["failures"] == found["replayed"]["failures"]
    assert all(0 <= r["second_called_success"] <= r["failures"] for r in found["truth"]["checked"])
    assert {"second world_model", "second tokenizer", "second scorer"} <= found["frozen"].keys()
    page = (out / "report.html").read_text()
    assert "second opinion" in page and "checked in" in page

    again = worldline(*command(lab, lab.bc, out, *truth))
    assert again.code == 2 and "check_world_model" in again.err  # a run's second opinion cannot be dropped halfway
    same = worldline(*command(lab, lab.bc, tmp_path / "same", "--check-world-model", lab.wm, *truth))
    assert same.code == 2 and "another model than --world-model required" in same.err
    lone = worldline(*command(lab, lab.bc, tmp_path / "lone", "--check-scorer", lab.scorer, *truth))
    assert lone.code == 2 and "check_scorer goes with check_world_model" in lone.err


def test_what_cannot_be_refined_is_said(lab: Lab, worldline: Run, tmp_path: Path) -> None:
    out = tmp_path / "none"

    def refused(*parts: str, policy: Path = lab.bc, more: tuple[object, ...] = ()) -> None:
        said = worldline(*command(lab, policy, out, *more))
        assert said.code == 2 and all(p in said.err for p in parts), said.err
        assert not out.exists() or not list(out.rglob("*.safetensors"))

    quick = ["--rl.iterations", 1, "--videos", 0, "--override-audit", False]
    audited = worldline(*command(lab, lab.bc, tmp_path / "audited", *quick))
    if audited.code:  # the tiny scorer may pass
        assert "a scorer that passed its audit is required" in audited.err
    refused("a policy is required here, this is a scorer", policy=lab.scorer)
    refused("whole groups of 8 (grpo), got 4", more=("--rl.ppo.algorithm", "grpo"))
    refused("threshold between 0 and 1 required, got 1.5", more=("--threshold", 1.5))
    refused("--doubt-steps: solver_steps=99 asks for level", more=("--doubt-steps", 99))
    # a mistyped simulator is said before hours of training, not after them
    refused('"arm/<task>", "metaworld/<task>" or "gym/<environment id>", got \'drawer\'', more=("--truth", "drawer"))
    refused("clip must be above 0", more=("--rl.ppo.clip", -1))
