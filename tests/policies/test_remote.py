"""A served policy is the local policy; whatever goes wrong on the way says what was required, got, and to do."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from tests.oracles import SPEC, DotPolicy, DotScorer, ExactDotWorldModel, dot_tokenizer
from tests.policies.dots import small_policy, starts
from tests.policies.test_wrappers import Counting, sent
from worldline.errors import PolicyError, SpecMismatch
from worldline.policies import Corrupted, load_policy
from worldline.policies.remote import RemotePolicy
from worldline.policies.serve import PolicyServer
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.types import CameraSpec, Policy

HELLO = {"protocol": "worldline-policy", "version": 1, "name": "toy", "chunk": 2}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def raw_server(converse: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A server that says whatever `converse` says."""
    with serve(converse, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"


def answering(answer: object, hello: dict | str | bytes = HELLO) -> Callable[[ServerConnection], None]:
    def converse(connection: ServerConnection) -> None:
        connection.send(msgpack.packb(hello) if isinstance(hello, dict) else hello)
        for _ in connection:
            connection.send(answer if isinstance(answer, (str, bytes)) else msgpack.packb(answer))

    return converse


def actions(array: np.ndarray) -> dict:
    return {
        "type": "actions",
        "actions": {"shape": list(array.shape), "dtype": array.dtype.name, "data": array.tobytes()},
    }


def ask(policy: RemotePolicy, n: int = 3):
    return policy.act(starts(n), policy.reset(n), seeds=torch.arange(n))


@pytest.mark.parametrize(
    "local", [DotPolicy(0.7, noise=0.3, chunk=4), small_policy("bc", sample=True)], ids=["stateful", "cloned"]
)
def test_a_served_policy_dreams_the_same_dreams_as_the_local_one(local: Policy) -> None:
    tokenizer = dot_tokenizer()
    dream = Dream(ExactDotWorldModel(tokenizer), tokenizer)
    begin, seeds = starts(7), torch.arange(7) + 100
    here = rollout(dream, local, DotScorer(), begin, frames=9, seeds=seeds, batch=4)
    with PolicyServer(local, name="dot") as server, RemotePolicy(server.url, SPEC) as remote:
        there = rollout(dream, remote, DotScorer(), begin, frames=9, seeds=seeds, batch=4)
        assert isinstance(remote, Policy) and remote.name == "dot"
    assert torch.allclose(here.actions, there.actions, atol=1e-6)
    assert torch.equal(here.probability, there.probability)


def test_a_stateful_server_keeps_each_episodes_memory_apart() -> None:
    """Rows are asked in other groups and orders than before; each goes on where it was."""
    with PolicyServer(Counting(2)) as server, RemotePolicy(server.url, SPEC) as policy:
        assert policy.hello.stateful
        observation, seeds = starts(3), torch.arange(3)
        _, state = policy.act(observation, policy.reset(3), seeds=seeds)
        # row 2 alone, then all in another order, row 0 reset to a new episode
        _, alone = policy.act(starts(1), state.index(torch.tensor([2])), seeds=seeds[:1])
        merged = state.where(torch.tensor([False, False, True]), alone.index(torch.tensor([0, 0, 0])))
        merged = merged.where(torch.tensor([True, False, False]), policy.reset(3)).index(torch.tensor([2, 0, 1]))
        chunk, merged = policy.act(observation, merged, seeds=seeds)
        assert (chunk[..., 0] * 100).round().long().tolist() == [[5, 6], [1, 2], [3, 4]]
        assert merged.tensors["asked"].tolist() == [3, 1, 2]


def test_episode_ids_are_never_used_twice() -> None:
    with PolicyServer(Counting(2)) as server, RemotePolicy(server.url, SPEC) as policy:
        ids = torch.cat([policy.reset(4).tensors["episode"] for _ in range(3)])
        assert len(ids.unique()) == 12


def test_forking_a_stateful_episode_is_refused_and_a_stateless_one_is_not() -> None:
    with PolicyServer(Counting(2)) as server, RemotePolicy(server.url, SPEC) as policy:
        _, state = ask(policy)
        twice = state.index(torch.tensor([0, 0]))
        with pytest.raises(PolicyError, match="forked or rewound"):
            policy.act(starts(2), twice, seeds=torch.arange(2))
        policy.act(starts(3), state, seeds=torch.arange(3))
        with pytest.raises(PolicyError, match="forked or rewound"):
            policy.act(starts(3), state, seeds=torch.arange(3))
    with PolicyServer(small_policy("bc")) as server, RemotePolicy(server.url, SPEC) as policy:
        _, state = ask(policy)
        forked, _ = policy.act(starts(3), state.index(torch.tensor([1, 1, 1])), seeds=torch.arange(3))
        assert forked.shape == (3, 2, 2)


def test_a_server_that_forgot_an_episode_says_so() -> None:
    with PolicyServer(Counting(2), remember=2) as server, RemotePolicy(server.url, SPEC) as policy:
        _, state = ask(policy, 3)
        with pytest.raises(PolicyError, match=r"reports: episodes this server remembers are required .the last 2"):
            policy.act(starts(3), state, seeds=torch.arange(3))


def test_load_policy_takes_an_address_with_corruption() -> None:
    with PolicyServer(Counting(4)) as server:
        policy = load_policy(f"{server.url}@lag=3", spec=SPEC)
        assert isinstance(policy, Corrupted)
        assert sent(policy, 4, n=1).tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]
        policy.policy.close()


def test_an_address_says_how_long_an_answer_may_take() -> None:
    with PolicyServer(Counting(4)) as server:
        patient = load_policy(f"{server.url}@timeout=60", spec=SPEC)
        worse = load_policy(f"{server.url}@lag=3,timeout=7.5", spec=SPEC)
        assert isinstance(patient, RemotePolicy) and patient.timeout == 60
        assert isinstance(worse, Corrupted) and worse.policy.timeout == 7.5
        with pytest.raises(PolicyError, match=r"timeout=SECONDS required after '@', got 'long'"):
            load_policy(f"{server.url}@timeout=long", spec=SPEC)
        for policy in (patient, worse.policy):
            policy.close()


# --- what the server declares -----------------------------------------------------------------------------------------


def test_what_the_server_declares_is_what_the_policy_requires() -> None:
    hello = HELLO | {
        "control_steps": 4,
        "action": {"names": ["j1", "j2"], "kind": "absolute", "space": "joint"},
        "cameras": [{"name": "wrist", "height": 24, "width": 32}],
        "pose_names": ["q1"],
    }
    with raw_server(answering(b"", hello)) as url, RemotePolicy(url, SPEC) as policy:
        assert policy.spec == replace(
            SPEC,
            control_steps=4,
            action=replace(SPEC.action, names=("j1", "j2"), kind="absolute", space="joint"),
            cameras=(CameraSpec(name="wrist", height=24, width=32),),
            pose_names=("q1",),
        )
        tokenizer = dot_tokenizer()
        with pytest.raises(SpecMismatch) as error:
            rollout(
                Dream(ExactDotWorldModel(tokenizer), tokenizer),
                policy,
                None,
                starts(1),
                frames=2,
                seeds=torch.arange(1),
            )
        for line in (
            "camera wrist: required 24x32, got none",
            "control_steps: required 4, got 2",
            "action.kind",
            "pose_names",
        ):
            assert line in str(error.value)
        with pytest.raises(PolicyError, match="camera wrist of 24x32 required, got none"):
            ask(policy)


def test_a_camera_of_another_size_is_refused_before_anything_is_sent() -> None:
    hello = HELLO | {"cameras": [{"name": "top", "height": 32, "width": 32}]}
    refused = pytest.raises(PolicyError, match="camera top of 32x32 required, got 16x16")
    with raw_server(answering(b"", hello)) as url, RemotePolicy(url, SPEC) as policy, refused:
        ask(policy)


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (HELLO | {"protocol": "openpi"}, "protocol 'worldline-policy' version 1 required, got 'openpi'"),
        (HELLO | {"version": 2}, "got 'worldline-policy' version 2"),
        ({"metadata": {}}, "got None version None"),
        ("hello", "a binary msgpack message required, got text 'hello'"),
        (b"\xc1\xc1", "that are not"),
        (msgpack.packb([1]), "a msgpack map required, got list"),
        ({k: v for k, v in HELLO.items() if k != "chunk"}, "chunk"),
        (HELLO | {"chunk": 0}, "at least 1 required"),
        (HELLO | {"cameras": [{"name": "top"}]}, "height"),
        (HELLO | {"action": {"names": ["a", "b", "c"]}}, "declares 3 action names .* the world has 2"),
        (HELLO | {"action": {"meaning": "joints"}}, "got .'meaning'."),
    ],
)
def test_a_hello_that_cannot_be_used(hello: object, says: str) -> None:
    with raw_server(answering(b"", hello)) as url, pytest.raises(PolicyError, match=says):
        RemotePolicy(url, SPEC)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    url = f"ws://127.0.0.1:{free_port()}"
    with pytest.raises(
        PolicyError, match=f"a policy server required at {url}, got none .*ConnectionRefused.*Start one"
    ):
        RemotePolicy(url, SPEC, retries=0)
    with pytest.raises(PolicyError, match="a policy server required at ws://"):
        RemotePolicy("ws://", SPEC, retries=0)


def test_a_server_that_is_still_starting_is_waited_for() -> None:
    port = free_port()
    servers: list[PolicyServer] = []
    timer = threading.Timer(0.5, lambda: servers.append(PolicyServer(DotPolicy(0.5), port=port).start()))
    timer.start()
    with RemotePolicy(f"ws://127.0.0.1:{port}", SPEC, retries=3) as policy:
        assert ask(policy)[0].shape == (3, 2, 2)
    servers[0].close()


def test_a_server_killed_in_the_middle() -> None:
    tokenizer = dot_tokenizer()
    dream = Dream(ExactDotWorldModel(tokenizer), tokenizer)
    server = PolicyServer(small_policy("bc")).start()
    policy = RemotePolicy(server.url, SPEC, retries=0)
    ask(policy)
    server.close()
    with pytest.raises(PolicyError, match=f"{server.url}.*(went away|got none)"):
        rollout(dream, policy, None, starts(2), frames=3, seeds=torch.arange(2))


def test_a_request_is_repeated_to_a_stateless_server_that_came_back_and_not_to_a_stateful_one() -> None:
    for local, repeated in ((small_policy("bc"), True), (Counting(2), False)):
        first = PolicyServer(local).start()
        policy = RemotePolicy(first.url, SPEC, retries=2)
        chunk, state = ask(policy)
        first.close()
        with PolicyServer(local, port=int(first.url.rsplit(":", 1)[1])):
            if repeated:
                assert torch.equal(ask(policy)[0], chunk)
            else:
                with pytest.raises(PolicyError, match="went away"):
                    policy.act(starts(3), state, seeds=torch.arange(3))
            policy.close()


def test_a_program_that_ends_hangs_up() -> None:
    """A server once told of every finished ranking with a traceback: its client was gone without a word."""
    ended: list[str] = []

    def converse(connection: ServerConnection) -> None:
        connection.send(msgpack.packb(HELLO))
        try:
            connection.recv()
        except ConnectionClosed as closed:
            ended.append(type(closed).__name__)

    program = """
import sys
from tests.oracles import SPEC
from worldline.policies.remote import RemotePolicy
policy = RemotePolicy(sys.argv[1], SPEC)
"""
    with raw_server(converse) as url:
        done = subprocess.run(
            [sys.executable, "-c", program, url],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        until = time.monotonic() + 10
        while not ended and time.monotonic() < until:
            time.sleep(0.05)
    assert ended == ["ConnectionClosedOK"]


def test_a_server_that_answers_too_late() -> None:
    def slow(connection: ServerConnection) -> None:
        connection.send(msgpack.packb(HELLO))
        for _ in connection:
            time.sleep(0.6)
            connection.send(msgpack.packb(actions(np.zeros((3, 2, 2), np.float32))))

    with raw_server(slow) as url:
        policy = RemotePolicy(url, SPEC, timeout=0.2)
        with pytest.raises(PolicyError, match=r"an answer within 0.2 s required, got none"):
            ask(policy)
        policy.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (actions(np.zeros((3, 2, 3), np.float32)), r"shape \(3, 2, 2\) .*got torch.float32 \(3, 2, 3\)"),
        (actions(np.zeros((3, 4, 2), np.float32)), r"got torch.float32 \(3, 4, 2\)"),
        (actions(np.zeros((2, 2, 2), np.float32)), r"got torch.float32 \(2, 2, 2\)"),
        (actions(np.zeros((3, 2, 2), np.int64)), "float32 actions .* got torch.int64"),
        (actions(np.zeros((3, 2, 2), np.float64)), "'float64'"),
        (actions(np.full((3, 2, 2), np.nan, np.float32)), "NaN or infinity in 3 of 3 rows"),
        ({"type": "actions", "actions": {"shape": [3, 2, 2], "dtype": "float32", "data": b"123"}}, "48 bytes required"),
        ({"type": "actions", "actions": [[1.0]]}, "an array .* required, got list"),
        ({"type": "actions"}, "an array .* required, got NoneType"),
        ({"type": "metadata"}, "type 'actions' or 'error' required, got 'metadata'"),
        ({"type": "error", "message": "no gripper camera"}, "reports: no gripper camera"),
        ("oops", "got text 'oops'"),
    ],
)
def test_an_answer_that_is_no_action_chunk(answer: object, says: str) -> None:
    refused = pytest.raises(PolicyError, match=says)
    with raw_server(answering(answer)) as url, RemotePolicy(url, SPEC) as policy, refused:
        ask(policy)


def test_images_arrive_as_rows_of_height_width_rgb_and_rows_carry_their_episode() -> None:
    requests: list[dict] = []

    def converse(connection: ServerConnection) -> None:
        connection.send(msgpack.packb(HELLO))
        for message in connection:
            requests.append(msgpack.unpackb(message))
            connection.send(msgpack.packb(actions(np.zeros((3, 2, 2), np.float32))))

    observation = starts(3)
    observation.images["top"][:, 1] = 7  # the channels can be told apart
    seeds = torch.tensor([1, 2**62, 3])
    with raw_server(converse) as url, RemotePolicy(url, SPEC) as policy:
        _, state = policy.act(observation, policy.reset(3), seeds=seeds)
        policy.act(observation, state, seeds=seeds)
    image = requests[0]["images"]["top"]
    assert image["shape"] == [3, 16, 16, 3] and image["dtype"] == "uint8"
    expected = observation.images["top"].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.frombuffer(image["data"], np.uint8).reshape(3, 16, 16, 3), expected)
    pose = requests[0]["pose"]
    assert np.array_equal(np.frombuffer(pose["data"], "<f4").reshape(pose["shape"]), observation.pose.numpy())
    assert requests[0]["fresh"] == [True] * 3 and requests[1]["fresh"] == [False] * 3
    assert requests[1]["asked"] == [1] * 3 and requests[0]["seeds"] == [1, 2**62, 3]
    assert requests[0]["episodes"] == requests[1]["episodes"] and len(set(requests[0]["episodes"])) == 3
    assert requests[0]["instruction"] == ["go right"] * 3


# --- the example servers ----------------------------------------------------------------------------------------------


@contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen]:
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield running
    finally:
        running.terminate()
        running.communicate(timeout=20)


def test_the_documented_server_works_without_worldline(tmp_path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "remote_policy.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None and "worldline" not in re.findall(r"^(?:import|from) .*$", code[1], re.MULTILINE)
    port = free_port()
    (tmp_path / "server.py").write_text(code[1].replace("8765", str(port)))
    command = [sys.executable, "-I", str(tmp_path / "server.py")]
    with process(command), RemotePolicy(f"ws://127.0.0.1:{port}", SPEC, retries=60) as policy:
        chunk, _ = ask(policy)
    assert torch.equal(chunk, torch.zeros(3, 8, 2))


def test_the_serving_script_serves_a_checkpoint(tmp_path) -> None:
    local = small_policy("bc")
    local.save_pretrained(tmp_path / "bc")
    script, port = Path(__file__).parents[2] / "scripts" / "serve_policy.py", free_port()
    command = [sys.executable, str(script), str(tmp_path / "bc"), "--port", str(port)]
    with process(command), RemotePolicy(f"ws://127.0.0.1:{port}", SPEC, retries=60) as policy:
        chunk, _ = ask(policy)
    expected, _ = local.act(starts(3), local.reset(3), seeds=torch.arange(3))
    assert torch.allclose(chunk, expected, atol=1e-6)


def test_the_serving_script_names_what_is_missing(tmp_path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "serve_policy.py"
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "none")], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 1 and "error: " in ran.stderr and "spec.json" in ran.stderr
    assert "Traceback" not in ran.stderr
