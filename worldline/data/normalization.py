"""Robust scaling of actions and poses: the 1st and 99th percentile of each dimension go to -1 and 1.

The same object is used in training and rollout and is saved with the model. Values outside the percentiles are scaled
on, not cut, unless `clip` is given; a dimension that (nearly) never changes is only centred, so that noise in it is not
blown up. Quantiles of streams longer than `max_rows` are those of an even random sample of rows (reservoir sampling with
a fixed seed).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.checkpoint import from_json
from worldline.errors import DatasetError, SpecMismatch

LOW, HIGH = 0.01, 0.99
CONSTANT = 1e-6  # a range below this, relative to the values' size, counts as constant


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustNormalizer:
    """Affine map per dimension, [p01, p99] to [-1, 1]; constant dimensions are shifted to 0 and keep their unit.

    With `clip` set, `normalize` limits its result to [-clip, clip] and is then not invertible beyond.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    clip: float | None = None

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high):
            raise SpecMismatch(
                f"normalizer: low and high of one length required, got {len(self.low)}, {len(self.high)}"
            )
        if self.clip is not None and self.clip < 1:
            raise SpecMismatch(f"normalizer: a clip of at least 1 required, got {self.clip}")

    @classmethod
    def fit(cls, values: Float[Tensor, "*rows d"], *, clip: float | None = None) -> "RobustNormalizer":
        """Percentiles over all leading axes. Raises `DatasetError` for no rows or NaN."""
        if not values.shape[-1]:  # a robot that tells no pose
            return cls(low=(), high=(), clip=clip)
        flat = values.detach().reshape(-1, values.shape[-1]).double().cpu()
        if not len(flat):
            raise DatasetError("normalizer: at least one row of values required, got none.")
        if not torch.isfinite(flat).all():
            bad = int((~torch.isfinite(flat)).any(dim=1).sum())
            raise DatasetError(f"normalizer: finite values required, got NaN or infinity in {bad} of {len(flat)} rows.")
        ordered = flat.sort(dim=0).values
        return cls(low=_quantile(ordered, LOW), high=_quantile(ordered, HIGH), clip=clip)

    @classmethod
    def fit_streaming(
        cls,
        chunks: Iterable[Float[Tensor, "*rows d"]],
        *,
        clip: float | None = None,
        max_rows: int = 1_000_000,
        seed: int = 0,
    ) -> "RobustNormalizer":
        """`fit` over chunks that need not fit in memory together; exact up to `max_rows` rows."""
        generator = torch.Generator().manual_seed(seed)
        kept: list[Tensor] = []
        keys: list[Tensor] = []
        for chunk in chunks:
            rows = chunk.detach()[None].flatten(0, -2).cpu()
            kept.append(rows)
            keys.append(torch.rand(len(rows), generator=generator))
            if sum(map(len, kept)) > 2 * max_rows:
                kept, keys = _reservoir(kept, keys, max_rows)
        if not kept:
            raise DatasetError("normalizer: at least one row of values required, got none.")
        kept, _ = _reservoir(kept, keys, max_rows)
        return cls.fit(kept[0], clip=clip)

    @property
    def dim(self) -> int:
        return len(self.low)

    def normalize(self, values: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        center, scale = self._affine(values)
        out = (values - center) / scale
        return out if self.clip is None else out.clamp(-self.clip, self.clip)

    def denormalize(self, values: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        center, scale = self._affine(values)
        return values * scale + center

    def _affine(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if values.shape[-1] != self.dim:
            raise SpecMismatch(f"normalizer: values of {self.dim} dimensions required, got {values.shape[-1]}")
        low, high = torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)
        center, half = (low + high) / 2, (high - low) / 2
        constant = half <= CONSTANT * center.abs().clamp(min=1)
        scale = torch.where(constant, torch.ones_like(half), half)
        return center.to(values), scale.to(values)

    def to_dict(self) -> dict[str, Any]:
        return {"low": list(self.low), "high": list(self.high), "clip": self.clip}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "normalizer") -> "RobustNormalizer":
        return from_json(cls, dict(data), source=source)


def normalizers_to_json(actions: RobustNormalizer, poses: RobustNormalizer) -> dict[str, Any]:
    """What a checkpoint's config says of a model's normalisation."""
    return {"action_normalizer": actions.to_dict(), "pose_normalizer": poses.to_dict()}


def normalizers_from_json(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """`action_normalizer` and `pose_normalizer` as such a config says."""
    return {
        name: RobustNormalizer.from_dict(config[name], source=source)
        for name in ("action_normalizer", "pose_normalizer")
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizerSet:
    """One normalizer per embodiment, so that robots with other ranges can share a model."""

    by_embodiment: Mapping[str, RobustNormalizer]

    def __getitem__(self, embodiment: str) -> RobustNormalizer:
        if embodiment not in self.by_embodiment:
            raise SpecMismatch(
                f"normalizer of embodiment {embodiment!r} required, got {sorted(self.by_embodiment)}. "
                "Train on data of this embodiment, or correct its name."
            )
        return self.by_embodiment[embodiment]

    def to_dict(self) -> dict[str, Any]:
        return {name: normalizer.to_dict() for name, normalizer in self.by_embodiment.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "normalizers") -> "NormalizerSet":
        return cls(by_embodiment={k: RobustNormalizer.from_dict(v, source=f"{source}.{k}") for k, v in data.items()})


def _quantile(ordered: Tensor, q: float) -> tuple[float, ...]:
    """Linear interpolation between sorted rows; `torch.quantile` refuses more than 16 million numbers."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return tuple(torch.lerp(ordered[below], ordered[above], place - below).tolist())


def _reservoir(kept: list[Tensor], keys: list[Tensor], rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """The `rows` rows with the smallest random keys: an even sample of everything seen."""
    values, key = torch.cat(kept), torch.cat(keys)
    if len(values) <= rows:
        return [values], [key]
    chosen = key.argsort()[:rows]
    return [values[chosen]], [key[chosen]]
