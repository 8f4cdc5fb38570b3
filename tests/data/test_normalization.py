"""Percentiles go to -1 and 1, round trips are exact, constant dimensions and outliers behave."""

import json

import pytest
import torch

from worldline.data import NormalizerSet, RobustNormalizer
from worldline.errors import DatasetError, SpecMismatch, WorldlineError


def values(rows: int = 500) -> torch.Tensor:
    scale = torch.tensor([1.0, 1000.0, 1e-3])
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)) * scale + torch.tensor([0.0, 5e3, -1.0])


def test_percentiles_map_to_plus_and_minus_one() -> None:
    x = values().double()
    normalizer = RobustNormalizer.fit(x)
    ends = torch.quantile(x, torch.tensor([0.01, 0.99]).double(), dim=0)
    assert torch.allclose(normalizer.normalize(ends), torch.tensor([[-1.0] * 3, [1.0] * 3]).double())


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 5, 3)])
def test_round_trip_in_any_shape(shape: tuple[int, ...]) -> None:
    x = values(40).repeat(1, 1)[: int(torch.tensor(shape[:-1]).prod())].reshape(shape)
    normalizer = RobustNormalizer.fit(values())
    assert torch.allclose(normalizer.denormalize(normalizer.normalize(x)), x, rtol=1e-5, atol=1e-6)


def test_outliers_do_not_move_the_scale_and_are_clipped_only_on_request() -> None:
    x = values()
    wild = torch.cat([x, torch.full((1, 3), 1e6)])
    plain, clipped = RobustNormalizer.fit(wild), RobustNormalizer.fit(wild, clip=1.5)
    assert torch.allclose(plain.normalize(x), RobustNormalizer.fit(x).normalize(x), rtol=0.2, atol=0.2)
    assert plain.normalize(wild[-1])[0] > 1e5 and clipped.normalize(wild[-1]).tolist() == [1.5, 1.5, 1.5]
    inside = plain.normalize(x).abs().amax(dim=1) < 1.5
    assert torch.allclose(clipped.denormalize(clipped.normalize(x[inside])), x[inside], rtol=1e-5, atol=1e-6)


def test_constant_dimensions_are_centred_and_not_blown_up() -> None:
    x = torch.tensor([[2.0, 0.0], [2.0, 1.0], [2.0, 2.0]])
    normalizer = RobustNormalizer.fit(x)
    assert torch.equal(normalizer.normalize(x)[:, 0], torch.zeros(3))
    assert normalizer.normalize(torch.tensor([2.5, 1.0]))[0] == pytest.approx(0.5)
    assert torch.allclose(normalizer.denormalize(normalizer.normalize(x)), x)


def test_streaming_equals_fit_and_samples_evenly_when_too_long() -> None:
    x = values(3000)
    assert RobustNormalizer.fit_streaming(x.split(7)) == RobustNormalizer.fit(x)
    sampled = RobustNormalizer.fit_streaming(x.sort(dim=0).values.split(100), max_rows=1000)
    span = torch.tensor(RobustNormalizer.fit(x).high) - torch.tensor(RobustNormalizer.fit(x).low)
    assert torch.allclose(torch.tensor(sampled.high) - torch.tensor(sampled.low), span, rtol=0.15)


def test_saved_and_loaded_through_json() -> None:
    both = NormalizerSet(
        by_embodiment={"panda": RobustNormalizer.fit(values()), "xarm": RobustNormalizer.fit(values(9), clip=5.0)}
    )
    assert NormalizerSet.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    with pytest.raises(WorldlineError, match="not a valid RobustNormalizer"):
        RobustNormalizer.from_dict({"low": ["a"], "high": [1.0]})


def test_errors_say_what_was_required() -> None:
    both = NormalizerSet(by_embodiment={"panda": RobustNormalizer.fit(values())})
    with pytest.raises(SpecMismatch, match=r"embodiment 'aloha' required, got \['panda'\]"):
        both["aloha"]
    with pytest.raises(SpecMismatch, match="3 dimensions required, got 2"):
        both["panda"].normalize(torch.zeros(4, 2))
    with pytest.raises(DatasetError, match="NaN or infinity in 1 of 2 rows"):
        RobustNormalizer.fit(torch.tensor([[1.0], [torch.nan]]))
    for empty in (lambda: RobustNormalizer.fit(torch.zeros(0, 2)), lambda: RobustNormalizer.fit_streaming([])):
        with pytest.raises(DatasetError, match="at least one row"):
            empty()
