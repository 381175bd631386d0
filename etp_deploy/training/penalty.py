"""The penalty as a term of the loss, with its gradient in closed form.

The gradients are autograd's to add up: it knows what else there is of a weight's gradient, on which stream it is made
and who holds its memory. That is a gradient of the size of all weights, added once; `TorqueRegularizer.add_gradients`
makes none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from etp_deploy.training.shards import Weights

if TYPE_CHECKING:
    from etp_deploy.training.pulls import Pull


def penalty(pull: Pull, weights: Weights) -> Tensor:
    """Return the sum of pulls times sizes as a differentiable scalar."""
    value: Tensor = _Penalty.apply(pull, *weights)  # type: ignore[no-untyped-call]
    return value


class _Penalty(torch.autograd.Function):
    """The penalty: nothing of the size of the weights is kept for its backward pass but the weights."""

    @staticmethod
    def forward(ctx: Any, pull: Pull, *weights: Tensor) -> Tensor:
        sizes = pull.sizes(Weights(weights))
        ctx.pull = pull
        ctx.sizes = sizes
        ctx.save_for_backward(*weights)
        return torch.dot(sizes, pull.pulls)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        # so that to differentiate the gradients once more is an error, not a term left out
        if torch.is_grad_enabled() and not slope.requires_grad:
            slope = slope.detach().requires_grad_()
        found: tuple[Tensor | None, ...] = _gradients(ctx, slope)
        return found


@once_differentiable
def _gradients(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    weights, pull = Weights(ctx.saved_tensors), ctx.pull
    lines = pull.layout.spread(pull.coefficients(ctx.sizes) * slope, weights)
    pairs = zip(weights, lines, ctx.needs_input_grad[1:], strict=True)
    return (None, *(pull.gradient(weight, own) if asked else None for weight, own, asked in pairs))
