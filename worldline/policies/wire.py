"""The wire format of served policies: msgpack maps over a websocket, arrays as raw little-endian bytes.

    client                                    server
      | ---------------- connect ---------------> |
      | <--- hello {protocol, version, name, …} - |   once
      | --- act {images, pose, episodes, …} ----> |   one request ...
      | <--- actions {actions} or error {…} ----- |   ... one answer, in order

Arrays are maps `{"shape": [...], "dtype": "uint8", "data": bytes}`, C order. Images are "n h w c", as LeRobot and openpi
servers take them. Field by field in docs/remote_policy.md, with a server that needs no worldline.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from worldline.errors import PolicyError
from worldline.types import CameraSpec

PROTOCOL, VERSION = "worldline-policy", 1
_DTYPES = ("uint8", "int64", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a server says of itself. What it leaves out (None) is taken to be as the world has it.

    `action` holds any fields of `ActionSpec`, as a map. `stateful`: answers depend on what an episode showed before, so
    the rows of a request must not be forks of one another.
    """

    protocol: str
    version: int
    name: str
    chunk: int  # m, actions an answer
    control_steps: int | None = None
    action: Mapping[str, Any] | None = None
    cameras: tuple[CameraSpec, ...] | None = None
    pose_names: tuple[str, ...] | None = None
    stateful: bool = False


def read_hello(message: bytes | str, *, who: str) -> Hello:
    """The hello in `message`. Raises `PolicyError` for another protocol or version, or a field of the wrong kind."""
    data = unpack(message, who=who)
    said = data.get("protocol"), data.get("version")
    if said != (PROTOCOL, VERSION):
        raise PolicyError(
            f"{who}: protocol {PROTOCOL!r} version {VERSION} required, got {said[0]!r} version {said[1]!r}. "
            "Is another kind of server at this address, or one made for another version of worldline?"
        )
    try:
        hello = TypeAdapter(Hello).validate_python(data)
    except ValidationError as error:
        raise PolicyError(f"{who}: the server's hello is not valid: {error}. See docs/remote_policy.md.") from error
    if hello.chunk < 1 or (hello.control_steps is not None and hello.control_steps < 1):
        raise PolicyError(f"{who}: chunk and control_steps of at least 1 required, the server's hello says {hello}")
    return hello


def pack(message: Mapping[str, Any]) -> bytes:
    packed = msgpack.packb(message)
    assert packed is not None
    return packed


def unpack(message: bytes | str, *, who: str) -> dict[str, Any]:
    """A message as a map. Raises `PolicyError` if it is text, or not a msgpack map."""
    if isinstance(message, str):
        raise PolicyError(f"{who}: a binary msgpack message required, got text {message[:80]!r}")
    try:
        data = msgpack.unpackb(message)
    except (ValueError, msgpack.UnpackException) as error:
        raise PolicyError(
            f"{who}: a msgpack message required, got {len(message)} bytes that are not ({error})"
        ) from error
    if not isinstance(data, dict):
        raise PolicyError(f"{who}: a msgpack map required, got {type(data).__name__}")
    return data


def to_array(tensor: Tensor) -> dict[str, Any]:
    """A tensor as an array map; uint8, int64 and float32 are the types that travel."""
    array = tensor.detach().cpu().contiguous().numpy()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "data": array.tobytes()}


def from_array(value: Any, *, what: str) -> Tensor:
    """The tensor in an array map. Raises `PolicyError` naming `what` if bytes, shape and dtype do not fit together."""
    if not isinstance(value, dict) or not {"shape", "dtype", "data"} <= value.keys():
        raise PolicyError(f"{what}: an array {{shape, dtype, data}} required, got {type(value).__name__}")
    shape, dtype, data = value["shape"], value["dtype"], value["data"]
    if dtype not in _DTYPES or not isinstance(data, bytes) or not isinstance(shape, list):
        raise PolicyError(f"{what}: bytes of one of {_DTYPES} required, got {type(data).__name__} of {dtype!r}")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise PolicyError(f"{what}: a shape of whole numbers required, got {shape}")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise PolicyError(f"{what}: {expected} bytes required for shape {shape} of {dtype}, got {len(data)}")
    return torch.from_numpy(np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape))
