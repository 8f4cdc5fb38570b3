"""A policy that lives elsewhere: behind a websocket, in another process, environment or machine.

So a LeRobot or openpi policy is ranked without sharing a single pinned dependency with it. Two choices to know. What the
server declares it requires (cameras, poses, action names) becomes `spec`, so a world that cannot provide it is refused
before the first rollout; what it leaves out is taken from the world's spec. State stays on the server, keyed by episode
id; on this side it is only the ids and how often each was asked, so it can be indexed and reset by row like any other.
The messages are described in `worldline.policies.wire` and docs/remote_policy.md.
"""

import itertools
import logging
import time
import weakref
from dataclasses import fields, replace
from typing import Any
from urllib.parse import urlsplit

import torch
from jaxtyping import Float, Int
from torch import Tensor
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from worldline.errors import PolicyError
from worldline.policies.wire import Hello, from_array, pack, read_hello, to_array, unpack
from worldline.types import ActionSpec, Observation, TensorState, WorldSpec

log = logging.getLogger(__name__)


class RemotePolicy:
    """A `Policy` served over a websocket.

    Args:
        url: `ws://host:port` (or `wss://`).
        spec: what the world provides; fills in what the server does not declare.
        timeout: seconds an answer may take. The first answer of a large policy may need more.
        retries: how often to connect again, a second later each time, before giving up. A request is sent again only to
            a server that keeps no state; a stateful one has lost its episodes with the connection.

    Raises:
        PolicyError: nobody listens at `url`, it speaks another protocol, or what it declares contradicts itself.
    """

    def __init__(self, url: str, spec: WorldSpec, *, timeout: float = 10.0, retries: int = 2) -> None:
        if timeout <= 0 or retries < 0:
            raise PolicyError(f"timeout > 0 and retries >= 0 required, got timeout={timeout}, retries={retries}")
        self.url, self.timeout, self.retries = url, timeout, retries
        self._socket: ClientConnection | None = None
        self._ids = itertools.count(1)
        self._asked: dict[int, int] = {}  # stateful servers only: episode -> how often it was asked
        self.hello = self._connect()
        self.spec = declared_spec(self.hello, spec, who=url)

    @property
    def name(self) -> str:
        return self.hello.name

    def reset(self, n: int) -> TensorState:
        """n new episodes, with ids never used before on this policy."""
        ids = torch.tensor(list(itertools.islice(self._ids, n)), dtype=torch.long)
        return TensorState(tensors={"episode": ids, "asked": torch.zeros(n, dtype=torch.long)}, rows=n)

    def act(
        self, observation: Observation, state: TensorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """One chunk of `hello.chunk` actions a row.

        Raises:
            PolicyError: the server is gone, takes longer than `timeout`, reports an error, or answers with something
                that is not finite actions of the declared shape; a camera is missing or of another size; rows of a
                stateful server were forked.
        """
        episodes, asked = state.tensors["episode"], state.tensors["asked"]
        if self.hello.stateful:
            self._refuse_forks(episodes.tolist(), asked.tolist())
        request = {
            "type": "act",
            "images": {c.name: to_array(self._image(observation, c.name)) for c in self.spec.cameras},
            "pose": to_array(observation.pose.float()),
            "instruction": list(observation.instruction),
            "episodes": episodes.tolist(),
            "asked": asked.tolist(),
            "fresh": (asked == 0).tolist(),
            "seeds": seeds.tolist(),
        }
        answer = unpack(self._ask(pack(request)), who=self.url)
        actions = self._actions(answer, len(observation))
        if self.hello.stateful:
            self._asked.update(zip(episodes.tolist(), (asked + 1).tolist()))
        return actions, TensorState(tensors={"episode": episodes, "asked": asked + 1}, rows=len(state))

    def close(self) -> None:
        """Hang up. The next `act` connects again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- messages -----------------------------------------------------------------------------------------------------

    def _image(self, observation: Observation, name: str) -> Tensor:
        """Channels last, checked against what the server declared."""
        camera = self.spec.camera(name)
        image = observation.images.get(name)
        got = "none" if image is None else f"{image.shape[-2]}x{image.shape[-1]}"
        if image is None or tuple(image.shape[-2:]) != (camera.height, camera.width):
            raise PolicyError(
                f"policy {self.name!r} at {self.url}: camera {name} of {camera.height}x{camera.width} required, got {got}. "
                "Use a world with this camera, or resize on the server."
            )
        return image.permute(0, 2, 3, 1)

    def _actions(self, answer: dict[str, Any], n: int) -> Float[Tensor, "n m a"]:
        who = f"policy {self.name!r} at {self.url}"
        if answer.get("type") == "error":
            raise PolicyError(f"{who} reports: {answer.get('message')}")
        if answer.get("type") != "actions":
            raise PolicyError(f"{who}: an answer of type 'actions' or 'error' required, got {answer.get('type')!r}")
        actions = from_array(answer.get("actions"), what=f"{who}: actions")
        required = (n, self.hello.chunk, self.spec.action.dim)
        if actions.dtype != torch.float32 or tuple(actions.shape) != required:
            raise PolicyError(
                f"{who}: float32 actions of shape {required} (rows, chunk, {', '.join(self.spec.action.names)}) required, "
                f"got {actions.dtype} {tuple(actions.shape)}. Correct the server's hello or its answer."
            )
        if not torch.isfinite(actions).all():
            bad = int((~torch.isfinite(actions)).flatten(1).any(1).sum())
            raise PolicyError(f"{who}: finite actions required, got NaN or infinity in {bad} of {n} rows")
        return actions

    def _refuse_forks(self, episodes: list[int], asked: list[int]) -> None:
        stale = [e for e, times in zip(episodes, asked) if self._asked.get(e, 0) != times]
        if stale or len(set(episodes)) < len(episodes):
            raise PolicyError(
                f"policy {self.name!r} at {self.url} keeps state on its server, so an episode can go on only once; rows were "
                f"forked or rewound (episodes {stale or sorted({e for e in episodes if episodes.count(e) > 1})}). "
                "Run it without forking, or serve a policy that needs no memory."
            )

    # --- connection ---------------------------------------------------------------------------------------------------

    def _ask(self, request: bytes) -> bytes | str:
        attempts = 1 if self.hello.stateful else self.retries + 1
        for attempt in range(attempts):
            if self._socket is None:
                self._reconnect()
            assert self._socket is not None
            try:
                self._socket.send(request)
                return self._socket.recv(timeout=self.timeout)
            except TimeoutError as error:
                self.close()  # a late answer must not be taken for the next one's
                raise PolicyError(
                    f"policy {self.name!r} at {self.url}: an answer within {self.timeout:g} s required, got none. "
                    f"Look at the server's log; if it is only slow, allow it more: {self.url}@timeout=60."
                ) from error
            except (OSError, WebSocketException) as error:
                self.close()
                if attempt + 1 == attempts:
                    raise PolicyError(
                        f"policy {self.name!r} at {self.url}: the server went away before it answered ({error}). "
                        "Look at its log, start it again and repeat the run."
                    ) from error
                log.warning("%s: connection lost (%s), connecting again", self.url, error)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _reconnect(self) -> None:
        hello = self._connect()
        if hello != self.hello:
            raise PolicyError(f"{self.url}: the policy {self.hello} required, after reconnecting got {hello}")
        if hello.stateful:
            self._asked.clear()

    def _connect(self) -> Hello:
        """Open the socket and read the hello; tries again while nobody listens."""
        failure: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(1.0)
            try:
                # Raw images do not compress in useful time; a busy server may not answer pings, `timeout` guards instead.
                self._socket = connect(
                    self.url,
                    open_timeout=self.timeout,
                    close_timeout=1.0,
                    compression=None,
                    max_size=None,
                    ping_interval=None,
                    proxy=None if _is_local(self.url) else True,
                )
                # a server that loses its client without a word says so at length
                weakref.finalize(self, self._socket.close)
                return read_hello(self._socket.recv(timeout=self.timeout), who=self.url)
            except (OSError, WebSocketException) as error:
                self.close()
                failure = error
            except PolicyError:
                self.close()
                raise
        raise PolicyError(
            f"a policy server required at {self.url}, got none ({type(failure).__name__}: {failure}). "
            "Start one there (scripts/serve_policy.py, docs/remote_policy.md) or correct the address."
        ) from failure


def declared_spec(hello: Hello, world: WorldSpec, *, who: str) -> WorldSpec:
    """`world`, with what the server declares in place of it. Raises `PolicyError` if the declared action is incomplete."""
    given = dict(hello.action or {})
    if unknown := sorted(given.keys() - {f.name for f in fields(ActionSpec)}):
        raise PolicyError(f"{who}: action fields of ActionSpec required in the hello, got {unknown}")
    given |= {name: tuple(given[name]) for name in ("names", "low", "high") if name in given}
    dims = len(given.get("names", world.action.names))
    for name in ("low", "high"):
        if len(given.get(name, getattr(world.action, name))) != dims:
            raise PolicyError(
                f"{who}: the server declares {dims} action names {given.get('names')}, the world has {world.action.dim} "
                f"({', '.join(world.action.names)}). Declare names, low and high of the same number."
            )
    return replace(
        world,
        action=replace(world.action, **given),
        cameras=world.cameras if hello.cameras is None else hello.cameras,
        control_steps=hello.control_steps or world.control_steps,
        pose_names=world.pose_names if hello.pose_names is None else hello.pose_names,
        latent=None,
    )


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
