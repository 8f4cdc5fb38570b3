"""Serve any `Policy` over a websocket, for `RemotePolicy` (format: `worldline.policies.wire`).

    with PolicyServer(policy, port=0) as server:      # in a thread; port 0 takes a free one
        remote = RemotePolicy(server.url, spec)
    serve(policy, "0.0.0.0", 8765)                    # until interrupted

A server holds the state of every episode it was asked about, batched as the policy returned it, and puts the rows of a
request together through `index` and `where` alone, so any policy can be served. Oldest episodes are forgotten first.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as websocket_serve

from worldline.checkpoint import to_json
from worldline.errors import PolicyError, WorldlineError
from worldline.policies.wire import PROTOCOL, VERSION, from_array, pack, to_array, unpack
from worldline.types import Observation, Policy, TensorState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an episode's state is: row `row` of a batched state."""

    state: Any
    row: int


class PolicyServer:
    """Answers on `url` in a background thread from `start` (or `with`) to `close`.

    Args:
        policy: any `Policy`. It is asked once for an empty scene, to learn its chunk length.
        host, port: where to listen. Port 0 takes a free one. Whoever can reach it can use the policy.
        name: told to clients, who put it in their reports.
        remember: episodes of a connection whose state is kept.
    """

    def __init__(
        self, policy: Policy, host: str = "127.0.0.1", port: int = 0, *, name: str = "policy", remember: int = 4096
    ) -> None:
        self.policy, self.remember = policy, remember
        self._lock = threading.Lock()  # connections have a thread each, a policy is not promised to be thread-safe
        self.hello = hello(policy, name)
        try:
            self._server = websocket_serve(self._converse, host, port, compression=None, max_size=None)
        except OSError as error:
            raise PolicyError(f"cannot listen at {host}:{port} ({error}). Choose another host or port.") from error
        self.url = f"ws://{host}:{self._server.socket.getsockname()[1]}"
        self._thread: threading.Thread | None = None
        self._served = False

    def start(self) -> "PolicyServer":
        self._thread = threading.Thread(target=self.serve_forever, name="policy-server", daemon=True)
        self._served = True
        self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Answer in this thread until interrupted."""
        self._served = True
        self._server.serve_forever()

    def close(self) -> None:
        """Hang up on everyone and stop listening."""
        if not self._served:  # shutdown would wait for a loop that never ran
            self._server.socket.close()
            return
        self._server.shutdown()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "PolicyServer":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _converse(self, socket: ServerConnection) -> None:
        socket.send(pack(self.hello))
        episodes: OrderedDict[int, _Place] = OrderedDict()
        for message in socket:
            try:
                answer = self._answer(unpack(message, who="request"), episodes)
            except WorldlineError as error:
                log.warning("%s", error)
                answer = {"type": "error", "message": str(error)}
            socket.send(pack(answer))

    def _answer(self, request: Mapping[str, Any], episodes: OrderedDict[int, _Place]) -> dict[str, Any]:
        if request.get("type") != "act":
            raise PolicyError(f"a request of type 'act' required, got {request.get('type')!r}")
        missing = {"images", "pose", "instruction", "episodes", "fresh", "seeds"} - request.keys()
        if missing:
            raise PolicyError(f"an act request with {sorted(missing)} required, it has none of these")
        images = {c: from_array(a, what=f"camera {c}").permute(0, 3, 1, 2) for c, a in request["images"].items()}
        observation = Observation(
            images={c: image.contiguous() for c, image in images.items()},
            pose=from_array(request["pose"], what="pose"),
            instruction=tuple(request["instruction"]),
        )
        with self._lock:
            state = self._gather(request["episodes"], request["fresh"], episodes)
            actions, state = self.policy.act(observation, state, seeds=torch.tensor(request["seeds"]))
        for row, episode in enumerate(request["episodes"]):
            episodes[episode] = _Place(state=state, row=row)
            episodes.move_to_end(episode)
        while len(episodes) > self.remember:
            episodes.popitem(last=False)
        return {"type": "actions", "actions": to_array(actions.float())}

    def _gather(self, ids: list[int], fresh: list[bool], episodes: Mapping[int, _Place]) -> Any:
        """One state for the rows of a request, whichever earlier answers their states came with."""
        n = len(ids)
        if unknown := [e for e, new in zip(ids, fresh) if not new and e not in episodes]:
            raise PolicyError(
                f"episodes this server remembers are required (the last {self.remember} of a connection), "
                f"got {unknown[:5]}. Start them again."
            )
        places = [None if new else episodes[e] for e, new in zip(ids, fresh)]
        groups = {id(p.state): p.state for p in places if p is not None}
        state = self.policy.reset(n)
        for key, batch in groups.items():
            member = [p is not None and id(p.state) == key for p in places]
            rows = torch.tensor([p.row if p is not None and mine else 0 for p, mine in zip(places, member)])
            state = batch.index(rows) if all(member) else state.where(torch.tensor(member), batch.index(rows))
        return state


def serve(policy: Policy, host: str = "127.0.0.1", port: int = 8765, *, name: str = "policy") -> None:
    """Serve `policy` until interrupted."""
    server = PolicyServer(policy, host, port, name=name)
    log.info("serving %s at %s", name, server.url)
    try:
        server.serve_forever()
    finally:
        server.close()


def hello(policy: Policy, name: str) -> dict[str, Any]:
    """What a server says first. The chunk length is found by asking the policy about an empty scene."""
    spec, state = policy.spec, policy.reset(1)
    blank = Observation(
        images={c.name: torch.zeros(1, 3, c.height, c.width, dtype=torch.uint8) for c in spec.cameras},
        pose=torch.zeros(1, len(spec.pose_names)),
        instruction=("",),
    )
    chunk: Tensor = policy.act(blank, state, seeds=torch.zeros(1, dtype=torch.long))[0]
    return {
        "protocol": PROTOCOL,
        "version": VERSION,
        "name": name,
        "chunk": chunk.shape[1],
        "control_steps": spec.control_steps,
        "action": to_json(spec.action),
        "cameras": to_json(spec.cameras),
        "pose_names": list(spec.pose_names),
        "stateful": not (isinstance(state, TensorState) and not state.tensors),
    }
