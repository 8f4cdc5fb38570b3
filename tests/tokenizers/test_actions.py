"""Two-hot codes: exact within the ends, two neighbours at most, linear between them."""

import pytest
import torch

from worldline.tokenizers import TwoHot


@pytest.mark.parametrize("code", [TwoHot(), TwoHot(bins=2), TwoHot(bins=7, low=-3.0, high=0.5)])
def test_a_value_within_the_ends_comes_back(code: TwoHot) -> None:
    values = torch.cat([torch.empty(4, 500).uniform_(code.low, code.high), code.values.expand(4, -1)], 1)
    weights = code.encode(values)
    assert torch.allclose(code.decode(weights), values, atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones_like(values)) and (weights >= 0).all()
    used = (weights > 0).sum(-1)
    assert used.max() <= 2
    first, last = (weights > 0).int().argmax(-1), code.bins - 1 - (weights > 0).flip(-1).int().argmax(-1)
    assert ((last - first) == used - 1).all()  # neighbours


def test_the_paper_s_weights() -> None:
    assert torch.allclose(TwoHot().encode(torch.tensor(0.07))[10:12], torch.tensor([0.3, 0.7]), atol=1e-6)
    assert TwoHot().nearest(torch.tensor([0.07, -1.0, 1.0, 0.04])).tolist() == [11, 0, 20, 10]


def test_values_beyond_the_ends_go_to_the_end() -> None:
    code = TwoHot()
    assert code.decode(code.encode(torch.tensor([-7.0, 1.5, torch.inf]))).tolist() == [-1.0, 1.0, 1.0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="without NaN required, got 1 of 3"):
        TwoHot().encode(torch.tensor([0.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match="at least 2 bins and low < high required, got 1"):
        TwoHot(bins=1)
