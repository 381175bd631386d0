"""The penalty as a term of the loss, whose gradient joins the one that the backward pass makes anyway.

Left to autograd, a gradient of the size of all weights would be made, kept through the whole backward pass and added
up: a sixth of a training step of VGG-19. Here the pass leaves a note at each weight, and where the rest of the weight's
gradient arrives, the penalty's is added to it, in place if nobody else holds that memory. Wherever this could be seen
(`torch.autograd.grad`, `create_graph`, hooks on a weight, a compiled penalty), autograd has its way.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from etp_deploy.training.shards import Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.utils.hooks import RemovableHandle

    from etp_deploy.training.pulls import Pull


def penalty(pull: Pull, weights: Weights) -> Tensor:
    """Return the sum of pulls times sizes as a differentiable scalar."""
    # what a compiler traces must not ask the engine
    owned = None if torch.compiler.is_compiling() else _owned()
    value: Tensor = _Penalty.apply(pull, owned, *weights)  # type: ignore[no-untyped-call]
    return value


class _Penalty(torch.autograd.Function):
    """The penalty with its gradient in closed form: nothing of the size of the weights is kept in between."""

    @staticmethod
    def forward(ctx: Any, pull: Pull, owned: Holders | None, *weights: Tensor) -> Tensor:
        sizes = pull.sizes(Weights(weights))
        ctx.pull = pull
        ctx.owned = owned
        ctx.sizes = sizes
        ctx.save_for_backward(*weights)
        return torch.dot(sizes, pull.pulls)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        graph = torch.is_grad_enabled()  # of the gradients, with `create_graph`
        # so that to differentiate them once more is an error, not a term left out
        slope = slope.detach().requires_grad_() if graph and not slope.requires_grad else slope
        found: tuple[Tensor | None, ...] = _gradients(ctx, slope, ctx.owned is not None and not graph)
        return found


@once_differentiable
def _gradients(ctx: Any, slope: Tensor, joins: bool) -> tuple[Tensor | None, ...]:
    """Return the gradient of each weight, None where it joins another one later."""
    weights, pull = Weights(ctx.saved_tensors), ctx.pull
    lines = pull.layout.spread(pull.coefficients(ctx.sizes) * slope, weights)
    wanted, nodes = ctx.needs_input_grad[2:], ctx.next_functions  # of tensors alone
    found: list[Tensor | None] = [None, None]
    for weight, own, asked, (node, _) in zip(weights, lines, wanted, nodes, strict=True):
        if not asked:
            found.append(None)
        elif joins and _may_join(weight, node):
            _Addition(weight, own, pull, ctx.owned).wait()
            found.append(None)
        else:
            found.append(pull.gradient(weight, own))
    return tuple(found)


def _may_join(weight: Tensor, node: Any) -> bool:
    """Return whether this backward pass adds up the gradient of a weight, and nobody looks while it does."""
    hooks = (weight._backward_hooks or {}).values()  # noqa: SLF001 - it has no other name
    if not weight.is_leaf or weight._post_accumulate_grad_hooks:  # noqa: SLF001 - as above
        return False
    if not all(isinstance(hook, _Addition) for hook in hooks):
        return False
    try:
        return torch._C._will_engine_execute_node(node)  # noqa: SLF001 - as torch.autograd.graph asks it
    except RuntimeError:  # the gradient is returned, by torch.autograd.grad, and added up nowhere
        return False


class _Addition:
    """A hook that adds the penalty's gradient to the rest of a weight's, once.

    Args:
        weight: a leaf.
        lines: the gradient's coefficients, see `Layout.spread`.
        pull: the force.
        owned: what holds a gradient that may be changed.
    """

    def __init__(self, weight: Tensor, lines: Sequence[Tensor], pull: Pull, owned: Holders) -> None:
        self._weight = weight
        self._lines = lines
        self._pull = pull
        self._owned = owned
        self._pass = torch._C._current_graph_task_id()  # noqa: SLF001 - as torch.utils.checkpoint asks it
        self._handle: RemovableHandle | None = None

    def wait(self) -> None:
        """Wait for the rest of the gradient."""
        self._handle = cast("RemovableHandle", self._weight.register_hook(self))  # type: ignore[no-untyped-call]

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        """Add to a gradient; return the sum where it is another tensor."""
        # a pass within the pass, as checkpoints make one, or one after a pass that failed
        if torch._C._current_graph_task_id() != self._pass:  # noqa: SLF001 - as above
            return None
        assert self._handle is not None
        self._handle.remove()
        with torch.no_grad():
            if gradient is None or gradient.layout != torch.strided:
                self._accumulate()
                return None
            out = gradient if _holders(gradient) == self._owned and _is_plain(gradient) else None
            total = self._pull.added(gradient, self._weight, self._lines, out)
        return None if total is gradient else total

    def _accumulate(self) -> None:
        """Add the penalty's gradient to what was added up so far: a hook may not make something of nothing."""
        weight, own = self._weight, self._pull.gradient(self._weight, self._lines)
        if weight.grad is None:
            weight.grad = own
        elif weight.grad.layout == torch.strided:
            weight.grad.add_(own)
        else:
            weight.grad = weight.grad + own


#: How many hold a tensor: references in Python, references to the tensor, and to its memory.
Holders = tuple[int, int, int]


def _holders(tensor: Tensor) -> Holders:
    memory = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # noqa: SLF001
    return sys.getrefcount(tensor), tensor._use_count(), memory  # type: ignore[attr-defined]  # noqa: SLF001


def _is_plain(gradient: Tensor) -> bool:
    """Return whether no two of its entries share memory, and it is a part of nothing."""
    dense = gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)
    return dense and not gradient._is_view()  # noqa: SLF001 - it has no other name


@functools.cache
def _owned() -> Holders | None:
    """Return what holds a gradient in a hook that nobody else has; None where it cannot be told from a shared one.

    Both are made and looked at, so that nothing is presumed of the versions of Python and torch.
    """
    if not hasattr(Tensor, "_use_count"):
        return None
    with torch.inference_mode(mode=False), torch.enable_grad():
        alone = _seen(lambda one, _: (one * 2).sum())
        # the same tensor for both, and two that share memory; the first to arrive is the one that would do harm
        same, kept = _seen(lambda one, other: (one + other).square().sum()), _seen(_Kept.apply)
        views = _seen(lambda one, other: (one.view(2, 2) + other.view(2, 2)).square().sum())
    owned = alone[0][0]
    told = owned != same[0][0] and owned != kept[0][0] and (views[0][1] or owned != views[0][0])
    return owned if told and not alone[0][1] else None


def _seen(loss: Callable[[Tensor, Tensor], Any]) -> list[tuple[Holders, bool]]:
    """Return what holds the gradients of two parameters in a hook, and whether they are views, first come first."""
    seen = []

    class Look:
        def __call__(self, gradient: Tensor | None) -> None:
            if gradient is not None:
                seen.append((_holders(gradient), gradient._is_view()))  # noqa: SLF001 - as above

    parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    for parameter in parameters:
        parameter.register_hook(Look())  # type: ignore[no-untyped-call]
    loss(*parameters).backward()
    return seen


class _Kept(torch.autograd.Function):
    """A function that gives as gradient what somebody still has."""

    HELD = torch.ones(4)

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        del ctx, other
        return one.sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        del ctx, slope
        return _Kept.HELD, None
