"""Checkpoint folders: `config.json`, `spec.json`, `model.safetensors`, `README.md` (model card). Nothing is unpickled.

One pair of functions serves every trained part. `config.json` records what the folder is (`part`, `kind`), the resolved
config and provenance; loading checks them before any tensor is read. Every file is written to a temporary name, flushed
and renamed, so a full disk or a kill leaves the previous checkpoint whole.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar

import huggingface_hub
import huggingface_hub.errors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.types import WorldSpec

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)
FORMAT = 1
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def to_json(value: Any) -> Any:
    """A (nested) dataclass, mapping or tuple as plain JSON types."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def from_json(cls: type[T] | GenericAlias, data: Any, *, source: str) -> T:
    """The dataclass `cls` from plain JSON types, every field checked. Raises `CheckpointError` naming `source`."""
    form: Any = cls  # a class, or a form such as tuple[CameraSpec, ...]
    try:
        return TypeAdapter(form).validate_python(_tuples(data))
    except ValidationError as error:
        raise CheckpointError(f"{source}: not a valid {cls.__name__}: {error}") from error


def _tuples(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_tuples(item) for item in data)
    if isinstance(data, dict):
        return {key: _tuples(item) for key, item in data.items()}
    return data


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write beside `path`, flush to disk, rename over it: readers see the old file or the new one, never half of one."""
    write_together({path: content})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """`write_atomic` of files that belong together: none is renamed into place before all are on disk.

    Raises `CheckpointError` if the disk is full or the folder cannot be written; the old files are then as they were.
    """
    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in files}
    path = None
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    except OSError as error:
        for leftover in temporary.values():
            if leftover.exists():
                leftover.unlink()
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror}); nothing was changed there. "
            "Free space or choose another --out, then run the same command again: it resumes."
        ) from error


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, _json_text(data))


def _finite(value: Any) -> Any:
    """Infinities and NaN by name: JSON has neither, and a measured fact may be one (the PSNR of an exact copy)."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _json_text(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: required, but there is no such file. Is {path.parent} a worldline folder?")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}). The file is damaged; restore or remake it."
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, about: Mapping[str, str] | None = None) -> None:
    """`about` goes into the file's header (`read_about`)."""
    write_atomic(path, _tensor_bytes(tensors, about))


def _tensor_bytes(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> bytes:
    """Tensors that share memory (tied weights, views) are written once each: safetensors refuses them otherwise."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return safetensors.torch.save(separate, dict(about) if about is not None else None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: required, but there is no such file. Did the training finish a checkpoint?")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}). Restore it or train again."
        ) from error


def read_about(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """What a file of tensors says of itself, and their shapes, without reading them. Nothing of one that is not there or not whole."""
    if not path.is_file():
        return {}, {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_slice(name).get_shape() for name in names}
    except safetensors.SafetensorError:
        return {}, {}


def fingerprint(tensors: Mapping[str, Tensor], config: Any = None) -> str:
    """Sixteen hex digits that change when any weight, name or config value changes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]


def best_device() -> str:
    """Where a trained part is put that is to be used: the GPU, if torch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_part(
    folder: str | Path,
    *,
    part: str,
    kind: str,
    config: Any,
    spec: Any,
    tensors: Mapping[str, Tensor] | str,
    provenance: Mapping[str, Any],
) -> None:
    """Write one trained part (`part` is 'tokenizer', 'world-model', 'world-models', 'policy', 'scorer', 'inverse', 'probe' or
    'trajectory-model'; `kind` its class). `tensors` may be the path, seen from `folder`, of weights that several parts share."""
    folder = Path(folder)
    about = {"format": FORMAT, "part": part, "kind": kind, "config": to_json(config), "provenance": _finite(provenance)}
    if isinstance(tensors, str):
        weights: dict[Path, bytes | str] = {}
        about["weights"] = tensors
    else:
        weights = {folder / "model.safetensors": _tensor_bytes(tensors)}
    write_together(
        {
            **weights,
            folder / "spec.json": _json_text(to_json(spec)),
            folder / "config.json": _json_text(about),
            folder / "README.md": _card(part, kind, provenance),
        }
    )


def weights_file(folder: str | Path) -> Path:
    """Where a checkpoint's weights are: in its folder, or where they are shared. Raises `CheckpointError` if those are gone."""
    folder = Path(folder)
    shared = read_json(folder / "config.json").get("weights") if (folder / "config.json").is_file() else None
    if shared is None:
        return folder / "model.safetensors"
    path = (folder / shared).resolve()
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: its weights are shared and are required in {path}, but there is no such file. Copy or move the whole of "
            f"{path.parent.name}/, not this folder alone."
        )
    return path


def load_tensors(
    module: torch.nn.Module,
    folder: str | Path,
    *,
    renew: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Strictly load `model.safetensors` into `module`. Raises `CheckpointError` naming what is missing or of another shape.

    `renew` gives the tensors of older checkpoints their present names.
    """
    tensors = read_tensors(Path(folder) / "model.safetensors")
    if renew is not None:
        tensors = renew(tensors)
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"not expected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name}: required {tuple(own[name].shape)}, got {tuple(tensors[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{folder}: the weights do not fit the model:\n  " + "\n  ".join(wrong[:10]))
    module.load_state_dict(tensors)


def load_part(
    folder: str | Path,
    *,
    part: str,
    build: Callable[[Any, WorldSpec, str], M],
    kind: str | None = None,
    renew: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> M:
    """A trained part in evaluation mode, from a folder or the Hugging Face Hub: the counterpart of `save_part`.

    `build(config, spec, source)` makes the untrained module from what was saved; `source` names the config in errors.
    `renew` as in `load_tensors`. Where a part has several kinds, `kind` is the one required.
    Raises `CheckpointError` if the folder is not such a part or its weights do not fit.
    """
    folder = resolve(folder)
    about = load_config(folder, part=part)
    if kind is not None and about["kind"] != kind:
        raise CheckpointError(f"{folder}: a {part} of kind {kind} is required here, this is of kind {about['kind']}.")
    config = about["config"]
    spec = from_json(WorldSpec, read_json(folder / "spec.json"), source=f"{folder}/spec.json")
    module = build(config, spec, f"{folder}/config.json")
    load_tensors(module, folder, renew=renew)
    return module.eval()


def resolve(folder: str | Path) -> Path:
    """A local checkpoint folder; a name like `user/model` that is no folder here is fetched from the Hugging Face Hub."""
    path = Path(folder)
    if path.exists() or not _HUB_NAME.fullmatch(str(folder)) or path.parent.exists():
        return path
    try:
        return Path(huggingface_hub.snapshot_download(str(folder)))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{folder}: no such folder, and it could not be fetched from the Hugging Face Hub ({type(error).__name__})."
        ) from error


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a checkpoint folder (without its training state) and return its address."""
    huggingface_hub.create_repo(repo, private=private, exist_ok=True)
    return str(
        huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=["training/*", "tensorboard/*"])
    )


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, within: str = "") -> list[str]:
    """A line for each setting that is another now, by its dotted name.

    A setting that `before` does not have at all is no change (older runs do not say everything); within one, every field counts.
    """
    lines: list[str] = []
    for name in {**before, **now} if within else now:
        was, value = (x.get(name, "not set" if within else now[name]) for x in (before, now))
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            lines += changes(was, value, within=f"{within}{name}.")
        elif was != value:
            lines.append(f"  {within}{name}: was {was!r}, is now {value!r}")
    return lines


STAGES_OF = {"trajectory-model": "trajectory"}  # of parts that are not called like the stage that makes them


def _a(part: str) -> str:
    return f"{'an' if part[0] in 'aeiou' else 'a'} {part}"


def load_config(folder: str | Path, *, part: str) -> dict[str, Any]:
    """`config.json` of a checkpoint folder, checked to be a `part`. Raises `CheckpointError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{part} required: no folder {folder}. Train one with `worldline train {STAGES_OF.get(part, part)}` or correct the path."
        )
    data = read_json(folder / "config.json")
    if data.get("part") != part:
        raise CheckpointError(
            f"{folder}: {_a(part)} is required here, this is {_a(data.get('part', 'folder of something else'))}."
        )
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {FORMAT} required, got {data.get('format')}.")
    return data


def _card(part: str, kind: str, provenance: Mapping[str, Any]) -> str:
    rows = "\n".join(f"- {key}: {value}" for key, value in provenance.items())
    return f"---\nlibrary_name: worldline\ntags: [robotics, world-model]\n---\n# worldline {part} ({kind})\n\n{rows}\n\nInspect with `worldline show <this folder>`.\n"
