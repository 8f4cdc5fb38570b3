"""Every stage trains on the dot world within seconds, and has then learned what it is for."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.oracles import GOAL, SPEC
from tests.trainers.toy import dot_episode
from worldline import checkpoint
from worldline.data import LatentCache, LeRobotDataset, write_dataset
from worldline.errors import CheckpointError, DatasetError, SpecMismatch
from worldline.eval.probes import Probe
from worldline.policies import ClonedPolicy, EncoderConfig, PolicyConfig
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer
from worldline.tokenizers import AutoencoderConfig, load_tokenizer
from worldline.trainers import policy, probe, scorer, tokenizer, world_model
from worldline.trainers.inputs import LatentBatches, claim_output, open_datasets
from worldline.trainers.loop import LoopConfig
from worldline.trainers.samples import SampleDraw
from worldline.worldmodels import AutoregressiveConfig, TransformerConfig, load_world_model

EYES = EncoderConfig(channels=(8, 16, 16), features=32, shift=0)
NETWORK = TransformerConfig(width=48, depth=2, heads=2, window=4)


def facts(folder: Path, part: str) -> dict:
    return checkpoint.load_config(folder, part=part)["provenance"]


def experts(dots: Path) -> int:
    """Training episodes that are demonstrations: every second one was recorded by the expert."""
    return sum(number % 2 == 0 for number in LeRobotDataset(dots).split("train"))


def loop(steps: int, **options) -> LoopConfig:
    return LoopConfig(**({"steps": steps, "batch_size": 32, "lr": 3e-3, "warmup": 10, "ema": 0.95} | options))


def world_model_config(dots: Path, patches: Path, out: Path, **options) -> world_model.TrainWorldModel:
    model = AutoregressiveConfig(network=NETWORK)
    return world_model.TrainWorldModel(data=(dots,), tokenizer=patches, out=out, frames=6, model=model, **options)


def test_patches_lose_nothing(dots, patches):
    dataset = LeRobotDataset(dots)
    video = {"top": dataset.episode(0).frames["top"][:][None]}
    loaded = load_tokenizer(patches)
    assert torch.equal(loaded.decode(loaded.encode(video))["top"], video["top"])
    assert max(loaded.latent_spec.mean["top"]) > -1  # statistics were fitted
    assert facts(patches, "tokenizer")["fingerprint"] == loaded.fingerprint


def test_a_small_autoencoder_learns_to_show_the_dot(dots, tmp_path):
    config = tokenizer.TrainTokenizer(
        data=(dots,),
        out=tmp_path / "tok",
        autoencoder=AutoencoderConfig(blocks=(16, 16), fold=2, latent_channels=4),
        loop=loop(100, lr=5e-3),
    )
    tokenizer.run(config, progress=False)
    loaded = load_tokenizer(tmp_path / "tok")
    video = LeRobotDataset(dots).episode(9).frames["top"][:].float()
    guess = video.median(dim=0).values  # the best still picture there is
    guessing = float(-10 * ((video - guess) / 255).square().mean().log10())
    assert facts(tmp_path / "tok", "tokenizer")["psnr/top"] > guessing + 5
    decoded = loaded.decode(loaded.encode({"top": video.to(torch.uint8)[None]}))["top"][0].float()
    assert float(-10 * ((video - decoded) / 255).square().mean().log10()) > guessing + 5


@pytest.fixture(scope="module")
def dreamer(dots, patches, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dreamer") / "wm"
    return world_model.run(world_model_config(dots, patches, out, loop=loop(110, lr=5e-3)), progress=False)


def test_the_world_model_beats_copying_and_needs_the_right_actions(dreamer):
    learned = facts(dreamer, "world-model")
    assert learned["error_vs_copy"] < 0.7
    assert learned["shuffled_vs_true"] > 1.3


def test_the_published_world_model_is_self_contained(dreamer, patches):
    model, beside = load_world_model(dreamer)
    assert model.latent_spec == beside.latent_spec == load_tokenizer(patches).latent_spec
    assert facts(dreamer, "world-model")["weights"] == sum(p.numel() for p in model.parameters())


def test_training_goes_on_from_other_weights_by_its_own_settings(dots, patches, dreamer, tmp_path):
    asked = AutoregressiveConfig(network=dataclasses.replace(NETWORK, width=96), pose_weight=3.0, solver_steps=2)
    config = dataclasses.replace(
        world_model_config(dots, patches, tmp_path / "then", init_from=dreamer, loop=loop(1)), model=asked
    )
    then, before = load_world_model(world_model.run(config, progress=False))[0], load_world_model(dreamer)[0]
    assert then.config == dataclasses.replace(asked, network=before.config.network)
    assert then.action_normalizer.to_dict() == before.action_normalizer.to_dict()


@pytest.fixture(scope="module")
def told(dots, patches, tmp_path_factory) -> Path:
    """A world model that reads instructions."""
    config = world_model_config(dots, patches, tmp_path_factory.mktemp("told") / "wm", loop=loop(1))
    return world_model.run(dataclasses.replace(config, model=AutoregressiveConfig(network=NETWORK, text="hashed")))


@pytest.mark.parametrize("text", ["none", "hashed"])
def test_training_goes_on_with_the_text_encoder_that_a_model_has(text, dots, patches, told, tmp_path):
    asked = AutoregressiveConfig(network=NETWORK, text=text)  # none: the flag was not repeated
    config = world_model_config(dots, patches, tmp_path / "then", init_from=told, loop=loop(1))
    then, _ = load_world_model(world_model.run(dataclasses.replace(config, model=asked), progress=False))
    assert then.reads_instructions


def test_a_text_encoder_that_a_model_lacks_is_refused_before_training(dots, patches, dreamer, tmp_path):
    asked = AutoregressiveConfig(network=NETWORK, text="hashed")
    config = world_model_config(dots, patches, tmp_path / "then", init_from=dreamer, loop=loop(1))
    with pytest.raises(SpecMismatch, match=r"--model\.text none required, .* got hashed"):
        world_model.run(dataclasses.replace(config, model=asked), progress=False)
    assert not (tmp_path / "then").exists()


def test_clips_must_be_as_long_as_the_window_of_the_weights_that_training_goes_on_from(
    dots, patches, dreamer, tmp_path
):
    wide = AutoregressiveConfig(network=replace(NETWORK, window=12))  # of no account: the weights have one of 4
    config = world_model_config(dots, patches, tmp_path / "then", init_from=dreamer, loop=loop(1))
    assert dataclasses.replace(config, model=wide, frames=6).frames == 6
    with pytest.raises(SpecMismatch, match=r"its window \(4\) required.* --frames 3"):
        world_model.run(dataclasses.replace(config, frames=3), progress=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_world_model_interrupted_and_resumed_is_bit_exact(optimizer, dots, patches, tmp_path, monkeypatch):
    options = {"loop": loop(6, batch_size=4, save_every=2, eval_every=6, optimizer=optimizer)}
    straight = world_model.run(world_model_config(dots, patches, tmp_path / "straight", **options), progress=False)
    whole = world_model.WorldModelStage.batch

    def interrupted(self, seed, step, size):
        if step == 3:
            raise KeyboardInterrupt
        return whole(self, seed, step, size)

    config = world_model_config(dots, patches, tmp_path / "resumed", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world_model.WorldModelStage, "batch", interrupted)
        world_model.run(config, progress=False)
    world_model.run(config, progress=False)
    for name in ("model.safetensors", "training/state.safetensors"):
        a, b = checkpoint.read_tensors(straight / name), checkpoint.read_tensors(tmp_path / "resumed" / name)
        assert [k for k in a if k != "seconds" and not torch.equal(a[k], b[k])] == []


def test_other_inputs_and_other_folders_are_refused(dots, patches, dreamer, tmp_path):
    changed = world_model_config(dots, patches, dreamer, stride=2, loop=loop(110, lr=5e-3))
    network = dataclasses.replace(changed.model.network, depth=3)
    deeper = dataclasses.replace(changed, stride=1, model=dataclasses.replace(changed.model, network=network))
    with pytest.raises(CheckpointError, match=r"other settings:\n  model\.network\.depth: was \d, is now 3\n"):
        world_model.run(deeper, progress=False)
    with pytest.raises(CheckpointError, match=r"holds a run with other settings:\n  stride: was 1, is now 2"):
        world_model.run(changed, progress=False)
    with pytest.raises(CheckpointError, match=r"a policy was to be trained here, it holds a world-model"):
        policy.run(policy.TrainPolicy(data=(dots,), out=dreamer), progress=False)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"an empty or new folder is required, it holds \['chapter\.tex'\]"):
        world_model.run(world_model_config(dots, patches, tmp_path / "thesis"), progress=False)
    with pytest.raises(CheckpointError, match=r"holds \['a file named chapter\.tex'\]"):
        claim_output(tmp_path / "thesis/chapter.tex", "policy", changed, identity=())


def test_a_claim_cut_short_is_no_obstacle(tmp_path, dots):
    config = policy.TrainPolicy(data=(dots,), out=tmp_path / "run")
    (tmp_path / "run/training").mkdir(parents=True)
    (tmp_path / "run/training/.run.json.7.tmp").write_text("{")
    claim_output(config.out, "policy", config, identity=("data",))
    claim_output(config.out, "policy", config, identity=("data",))
    assert checkpoint.read_json(tmp_path / "run/training/run.json")["part"] == "policy"


def test_the_scorer_tells_success_from_failure(dots, patches, tmp_path):
    config = scorer.TrainScorer(
        data=(dots,),
        out=tmp_path / "scorer",
        tokenizer=patches,
        scorer=SuccessConfig(encoder=EncoderConfig(window=2, channels=(8, 16, 16), features=32, shift=0), hidden=32),
        loop=loop(100, batch_size=33),  # odd: both kinds are drawn all the same
    )
    scorer.run(config, progress=False)
    said = facts(tmp_path / "scorer", "scorer")
    assert said["frame_accuracy"] > 0.9
    assert said["episode_accuracy"] == 1.0
    assert said["audit"]["exact"] == 1.0
    assert said["audit"]["static"] == 0.0  # a still first frame is no success
    assert said["audit"]["blurred"] == 0.0  # nor is mush: it has been told so
    loaded = SuccessScorer.from_pretrained(tmp_path / "scorer")
    held_out = open_datasets((dots,), "held-out")
    logits, done, _ = scorer.read_episodes(loaded, held_out, None)
    z, y = torch.cat(logits), torch.cat(done)
    assert float((z[y][:, None] > z[~y][None]).float().mean()) > 0.97  # area under the ROC curve


def test_a_scorer_that_reads_the_instruction_knows_whose_success_it_is(tmp_path):
    """The same picture is a success under one sentence and none under the other."""

    def told(index: int):
        episode = dot_episode(index, expert=index % 2 == 0)
        right = index // 2 % 2 == 0
        x = episode.poses[:, 0]
        done = x > GOAL if right else x < 0.15
        words = "go right" if right else "go left"
        return replace(episode, frame_success=done, success=bool(done.any()), instruction=words)

    data = write_dataset(tmp_path / "told", (told(i) for i in range(64)), codec="libx264", crf=10, split_seed=9)
    found = {}
    for text in ("none", "hashed"):
        config = scorer.TrainScorer(
            data=(data,),
            out=tmp_path / text,
            scorer=SuccessConfig(
                encoder=EncoderConfig(window=2, channels=(8, 16, 16), features=32, shift=0), hidden=32, text=text
            ),
            loop=loop(250, batch_size=32),
        )
        scorer.run(config, progress=False)
        found[text] = facts(tmp_path / text, "scorer")
    assert found["hashed"]["frame_accuracy"] > 0.9 > found["none"]["frame_accuracy"] + 0.05
    assert found["hashed"]["audit"]["other_instruction"] <= 0.2 and "other_instruction" not in found["none"]["audit"]
    loaded = SuccessScorer.from_pretrained(tmp_path / "hashed")
    with pytest.raises(SpecMismatch, match="one for each of 2 rows required, got 0"):
        loaded.logits({"top": torch.zeros(2, 6, 16, 16, dtype=torch.uint8)})


@pytest.mark.parametrize("kind", ["bc", "diffusion"])
def test_a_cloned_policy_beats_the_mean_action(dots, tmp_path, kind):
    config = policy.TrainPolicy(
        data=(dots,),
        out=tmp_path / "policy",
        kind=kind,
        policy=PolicyConfig(encoder=EYES, hidden=64, chunk=4),
        loop=loop(150, batch_size=64),
    )
    policy.run(config, progress=False)
    demonstrations = policy.demonstrations(open_datasets((dots,), "held-out"), "success", None, 0)
    draw = SampleDraw(demonstrations, policy.chunks(4))
    samples = draw.gather(torch.arange(len(draw)))
    mean = float((samples.target - samples.target.mean((0, 1))).abs().mean())
    loaded = ClonedPolicy.from_pretrained(tmp_path / "policy")
    chunk, _ = loaded.act(samples.observation, loaded.reset(len(draw)), seeds=torch.arange(len(draw)))
    assert float((chunk - samples.target).abs().mean()) < 0.7 * mean
    assert facts(tmp_path / "policy", "policy")["action_error"] < 0.7 * mean
    assert facts(tmp_path / "policy", "policy")["demonstrations"] == experts(dots)


def test_a_demonstration_shorter_than_a_chunk_is_passed_over(dots, tmp_path):
    episodes = [dot_episode(i, expert=True) for i in range(6)]
    short = replace(episodes[0], actions=episodes[0].actions[:2], frames={"top": episodes[0].frames["top"][:3]}, poses=episodes[0].poses[:3],
                    states=episodes[0].states[:3], frame_success=episodes[0].frame_success[:3], index=6)  # fmt: skip
    data = write_dataset(tmp_path / "data", [*episodes, short], split_seed=9)
    settings = {"policy": PolicyConfig(chunk=8, hidden=8, encoder=EYES), "loop": loop(2, batch_size=4)}
    policy.run(policy.TrainPolicy(data=(data,), out=tmp_path / "bc", demonstrations="all", **settings), progress=False)
    assert ClonedPolicy.from_pretrained(tmp_path / "bc").config.chunk == 8


def test_too_few_demonstrations_are_told(dots, tmp_path):
    found = experts(dots)
    config = policy.TrainPolicy(data=(dots,), out=tmp_path / "policy", episodes=found + 1)
    with pytest.raises(DatasetError, match=rf"{found + 1} demonstrations \(success\) required, {found} found among"):
        policy.run(config, progress=False)
    assert not (tmp_path / "policy").exists()  # nothing was claimed for a run that cannot be


def test_the_action_probe_beats_guessing_the_mean(dots, tmp_path):
    config = probe.TrainProbe(data=(dots,), out=tmp_path / "probe", target="action", loop=loop(200, batch_size=64))
    probe.run(config, progress=False)
    learned = facts(tmp_path / "probe", "probe")
    assert learned["held_out_error"] < 0.6 * learned["guessing_the_mean"]
    loaded = Probe.from_pretrained(tmp_path / "probe")
    episode = LeRobotDataset(dots).episode(9)
    read = loaded.read_video({"top": episode.frames["top"][:][None]})[0]
    assert read.shape == (len(episode) - 1, SPEC.action.dim)
    error = (read - episode.actions.mean(1)).norm(dim=1).mean()
    assert float(error) < 0.8 * float((episode.actions.mean(1) - episode.actions.mean((0, 1))).norm(dim=1).mean())


def test_the_pose_probe_reads_one_camera_and_is_the_same_when_loaded(dots, tmp_path, monkeypatch):
    config = probe.TrainProbe(
        data=(dots,), out=tmp_path / "probe", target="pose", camera="top", loop=loop(150, batch_size=64)
    )
    kept = []
    save = probe._ProbeStage.save

    def spy(self, model, folder, provenance):
        kept.append(model)
        save(self, model, folder, provenance)

    monkeypatch.setattr(probe._ProbeStage, "save", spy)
    probe.run(config, progress=False)
    learned = facts(tmp_path / "probe", "probe")
    assert learned["held_out_error"] < 0.5 * learned["guessing_the_mean"]
    loaded = Probe.from_pretrained(tmp_path / "probe")
    assert [c.name for c in loaded.spec.cameras] == ["top"] and loaded.config.names == SPEC.pose_names
    episode = LeRobotDataset(dots).episode(9)
    video = {"top": episode.frames["top"][:][None]}
    read = loaded.read_video(video)
    assert torch.allclose(read, kept[-1].eval().read_video(video), atol=1e-3), "trained and loaded normalise alike"
    off = (episode.poses - episode.poses.mean(0)).norm(dim=1).mean()
    assert float((read[0] - episode.poses).norm(dim=1).mean()) < 0.5 * float(off)


def test_pose_probes_of_what_is_not_there_are_refused(dots, tmp_path):
    for options, error, reason in (
        ({"camera": "wrist"}, SpecMismatch, r"camera required: 'wrist'; got cameras \['top'\]"),
        (
            {"camera": "top", "columns": (0, 2)},
            DatasetError,
            r"--columns below 2, the number of pose dimensions; got \(0, 2\)",
        ),
    ):
        with pytest.raises(error, match=reason):
            probe.run(probe.TrainProbe(data=(dots,), out=tmp_path / "no", target="pose", **options), progress=False)
    assert not (tmp_path / "no").exists()


def test_another_process_that_still_encodes_does_not_change_the_batches(dots, patches, monkeypatch):
    """Two processes once trained on different windows: one read the index that the other was only half through writing."""
    training = open_datasets((dots,), "train")
    options = {"frames": 6, "stride": 1, "device": "cpu", "progress": False}
    expected = LatentBatches(training, load_tokenizer(patches), **options).batch(0, 0, 8)
    build = LatentCache.build

    def overtaken(root, *arguments, **settings):
        cache = build(root, *arguments, **settings)
        index = checkpoint.read_json(root / "cache.json")
        checkpoint.write_json(root / "cache.json", index | {"lengths": {"0": [12]}, "instructions": {"0": "go right"}})
        return cache

    monkeypatch.setattr(LatentCache, "build", overtaken)
    again = LatentBatches(training, load_tokenizer(patches), **options).batch(0, 0, 8)
    assert torch.equal(again.frames["top"], expected.frames["top"])


def test_statistics_fitted_again_reach_a_cache_made_before(dots, patches):
    training, refitted = open_datasets((dots,), "train"), load_tokenizer(patches)
    options = {"frames": 6, "stride": 1, "device": "cpu", "progress": False}
    LatentBatches(training, refitted, **options)
    refitted.fit_statistics({"top": torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)})
    assert LatentBatches(training, refitted, **options).spec.latent == refitted.latent_spec


def test_batches_of_moments_are_whole_and_balanced(dots):
    draw = SampleDraw(open_datasets((dots,), "train"), scorer.frame_labels(1), balance=True)
    for size in (1, 7, 8):
        target = draw.batch(0, 3, size).target
        assert len(target) == size
        assert abs(int(target.sum()) - size / 2) <= 0.5
    again, other = draw.batch(0, 3, 8), draw.batch(0, 4, 8)
    assert torch.equal(again.observation.pose, draw.batch(0, 3, 8).observation.pose)
    assert not torch.equal(again.observation.pose, other.observation.pose)
    unlabelled = lambda episode: (torch.zeros(0, dtype=torch.long), torch.zeros(0))  # noqa: E731
    with pytest.raises(DatasetError, match=r"no moment to learn from in \d+ episodes"):
        SampleDraw(open_datasets((dots,), "train"), unlabelled)


def test_moments_at_a_stride_see_frames_apart_and_keep_every_success(dots):
    selections = open_datasets((dots,), "train", stride=3)
    draw = SampleDraw(selections, scorer.frame_labels(3), window=2)
    episode = selections[0].dataset.episode(selections[0].episodes[0])
    seen = draw.gather(torch.tensor([0, 2, 7]))  # moments of the first episode
    video = episode.frames["top"][:]
    for row, (before, now) in enumerate([(0, 0), (0, 2), (4, 7)]):
        assert torch.equal(seen.observation.images["top"][row], torch.cat([video[before], video[now]]))
    assert draw.spec.control_steps == 3 * selections[0].dataset.spec.control_steps

    lasting_one_frame = dataclasses.replace(episode, frame_success=torch.arange(len(episode)) == 4)
    times, labels = scorer.frame_labels(3)(lasting_one_frame)
    assert times[labels > 0.5].tolist() == [4, 5, 6], "whichever frames are kept, one of them is a success"


def test_clips_longer_than_any_episode_are_refused_before_encoding(dots, patches, tmp_path, monkeypatch):
    monkeypatch.setattr(LatentCache, "build", lambda *args, **options: pytest.fail("encoding began"))
    config = world_model.TrainWorldModel(data=(dots,), tokenizer=patches, out=tmp_path / "wm", frames=40, stride=2)
    with pytest.raises(
        DatasetError, match=r"at least 79 frames required for clips of 40 at stride 2, the longest of \d+ has"
    ):
        world_model.run(config, progress=False)
