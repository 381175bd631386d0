"""A force at work on all modules at once: its penalty, gradient and proximal step, one pass over the weights each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etp_deploy.training.layout import Layout
    from etp_deploy.training.shards import Weights

Norm = Literal["l2_squared", "mean_l1", "l1", "l2"]


@dataclass(frozen=True)
class Pull:
    """Forces on the modules of a layout.

    Attributes:
        layout: where the modules' weights lie.
        norm: what a module's size is.
        pulls: strength times force of each module, shape (total,).
    """

    layout: Layout
    norm: Norm
    pulls: Tensor

    def sizes(self, weights: Weights) -> Tensor:
        """Return each module's size, shape (total,)."""
        kind: Literal["squares", "absolutes"] = "absolutes" if self._absolute else "squares"
        sums = self.layout.by_module(self.layout.reduce(weights, kind))
        if self.norm == "mean_l1":
            return sums / self._elements
        return sums if self.norm in {"l1", "l2_squared"} else sums.sqrt() * self._elements.sqrt()

    def coefficients(self, sizes: Tensor | None) -> Tensor:
        """Return what each module's weights (or, of absolute values, their signs) are multiplied by in the gradient.

        The root in "l2" has no slope at zero: a module that is dead feels nothing and must not make a NaN.

        Args:
            sizes: from `sizes`; only "l2" needs them.
        """
        if self.norm == "l2_squared":
            return 2 * self.pulls
        if self.norm == "l1":
            return self.pulls
        if self.norm == "mean_l1":
            return self.pulls / self._elements
        assert sizes is not None
        return torch.where(sizes > 0, self.pulls * self._elements / sizes.clamp(min=1e-30), 0.0)

    def add_gradients(self, weights: Weights, scale: float) -> None:
        """Add the gradient, times a scale, to those weights that have one."""
        sizes = self.sizes(weights) if self.norm == "l2" else None
        lines = self.layout.spread(self.coefficients(sizes) * scale, weights)
        for number, (weight, own) in enumerate(zip(weights, lines, strict=True)):
            gradient = weights.gradient(number)
            if gradient is None:
                continue
            factor = _sum(own)
            if gradient.dtype == factor.dtype:
                gradient.addcmul_(weight.sign() if self._absolute else weight, factor)
            else:
                gradient.add_(self.gradient(weight, own))

    def gradient(self, weight: Tensor, lines: Sequence[Tensor]) -> Tensor:
        """Return the gradient of one weight, given its coefficients along its lines."""
        factor = _sum(lines)
        if self._absolute:
            return weight.sign().to(factor.dtype).mul_(factor).to(weight.dtype)
        return (weight.to(factor.dtype) * factor).to(weight.dtype)

    def shrink(self, weights: Weights, rate: float) -> None:
        """Take one proximal step of a length, see `TorqueRegularizer.shrink`."""
        row = rate * self.pulls
        if self.norm == "mean_l1":
            row = row / self._elements
        elif self.norm == "l2":
            norms = self.sizes(weights) / self._elements.sqrt()
            row = (1 - row * self._elements.sqrt() / norms.clamp(min=1e-30)).clamp(min=0)
        elif self.norm == "l2_squared":
            row = 2 * row
        rest = 1.0 if self.norm == "l2" else 0.0
        for weight, own in zip(weights, self.layout.spread(row, weights, rest=rest), strict=True):
            # a factor near one is exactly one in bfloat16: the step is taken in float32, and its result rounded
            exact = weight.to(torch.promote_types(weight.dtype, row.dtype))
            if self._absolute:
                step = _sum(own)
                exact.sub_(torch.clamp(exact, -step, step))
            else:
                exact.mul_(_product(own) if self.norm == "l2" else 1 / (1 + _sum(own)))
            if exact is not weight:
                weight.copy_(exact)

    @property
    def _absolute(self) -> bool:
        return self.norm in {"l1", "mean_l1"}

    @property
    def _elements(self) -> Tensor:
        # a module may have no weight that is pulled, and a mean over none is no NaN
        return self.layout.elements.clamp(min=1).to(self.pulls)


def _sum(lines: Sequence[Tensor]) -> Tensor:
    total = lines[0]
    for line in lines[1:]:
        total = total + line
    return total


def _product(lines: Sequence[Tensor]) -> Tensor:
    result = lines[0]
    for line in lines[1:]:
        result = result * line
    return result
