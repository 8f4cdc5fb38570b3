"""Returns and advantages from rewards and values, with termination and truncation kept apart.

Axes: n episodes side by side, t decisions. `value[:, i]` is of the state in which decision i was taken, `after[:, i]` of the
state it led to: of an episode that ended there the last state, never the next episode's first one.

- terminated: nothing follows, the state after it is worth 0.
- truncated: the clock ran out, the state after it is worth `after`.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from worldline.errors import WorldlineError


def advantages(
    reward: Float[Tensor, "n t"],
    value: Float[Tensor, "n t"],
    after: Float[Tensor, "n t"],
    terminated: Bool[Tensor, "n t"],
    truncated: Bool[Tensor, "n t"],
    *,
    discount: float,
    smoothing: float,
) -> Float[Tensor, "n t"]:
    """Generalised advantage estimates (1506.02438, equation 16): sum over l of (discount * smoothing)^l * delta_{i+l}.

    `smoothing` is lambda: 0 gives one-step errors, 1 the whole episode's return minus the value. What lies behind an episode's
    end adds nothing to what lies before it.
    """
    delta = reward + discount * after * ~terminated - value
    goes_on = ~(terminated | truncated)
    found, last = delta.clone(), delta.new_zeros(len(delta))
    for i in reversed(range(delta.shape[1])):
        last = delta[:, i] + discount * smoothing * last * goes_on[:, i]
        found[:, i] = last
    return found


def require_finite(reward: Float[Tensor, "n t"]) -> None:
    """Raise `WorldlineError` for NaN or infinite rewards, naming the first."""
    if not reward.isfinite().all():
        row, at = (~reward.isfinite()).nonzero()[0].tolist()
        raise WorldlineError(
            f"finite rewards required, got {float(reward[row, at])} in row {row}, decision {at}. The scorer gave it: train it again."
        )


def returns(
    reward: Float[Tensor, "n t"],
    after: Float[Tensor, "n t"],
    terminated: Bool[Tensor, "n t"],
    truncated: Bool[Tensor, "n t"],
    *,
    discount: float,
    smoothing: float,
) -> Float[Tensor, "n t"]:
    """Lambda returns (DreamerV2 2010.02193, equation 4), which is what a value should learn: r + discount * ((1 - lambda) * after +
    lambda * the next return), `after` alone at a truncation and at the end of the tensor, nothing at a termination."""
    found = reward.clone()
    follows = after[:, -1]
    for i in reversed(range(reward.shape[1])):
        follows = follows.where(~truncated[:, i], after[:, i])
        mixed = (1 - smoothing) * after[:, i] + smoothing * follows
        follows = reward[:, i] + discount * mixed * ~terminated[:, i]
        found[:, i] = follows
    return found


def group_advantages(total: Float[Tensor, " n"], group: int, *, least: float = 1e-6) -> Float[Tensor, " n"]:
    """GRPO (2402.03300): the return of each of `group` neighbouring rows, which began alike, over their mean, by their spread.

    0 in a group whose rows all did alike. Raises `ValueError` if the rows do not make whole groups of at least two.
    """
    if group < 2 or len(total) % group:
        raise ValueError(f"whole groups of at least 2 rows required, got groups of {group} and {len(total)} rows")
    each = total.unflatten(0, (-1, group))
    centred = each - each.mean(1, keepdim=True)
    return (centred / each.std(1, keepdim=True).clamp(min=least)).flatten()
