"""A network's ONNX graph in which every weight bears a number of its own, so that constants lead back to parameters.

Exporters rename weights, transpose, split and join them. Here a copy of the network is exported whose parameters
hold distinct numbers, the float32 of consecutive bit patterns: whatever moved is recognised by its value, entry by
entry, and whatever was computed with is not. BatchNorm, which an exporter would compute into the convolution
before it, is replaced in the copy by its gain and bias.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from etp_deploy.errors import ExportError, UsageError
from etp_deploy.sizes import counting_sizes, node_macs
from etp_deploy.surgery.analysis import read, solve
from etp_deploy.surgery.lines import code_edits, contraction_lines
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.tracing import EXPORTERS, evaluating, make_call, trace
from etp_deploy.training.modules import BATCH_NORMS
from etp_deploy.training.shards import whole
from etp_deploy.training.wrapping import named_parameters, plain_copy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from etp_deploy.surgery.analysis import Analysis
    from etp_deploy.surgery.lines import Line, Lines

# 2 ** -31 as bits: numbers up to 2 ** 28 weights stay below 4
_FIRST = 0x30000000
_MOST = 1 << 28
# no module's number
_FAR = 1 << 40
_OPSETS = {"dynamo": 20, "torchscript": 17}


@dataclass(frozen=True)
class Price:
    """What a network costs once its dead structure is removed.

    Attributes:
        parameters: weights that stay.
        macs: multiply-accumulates of one sample, dynamic sizes at 16.
    """

    parameters: int
    macs: int


@dataclass
class Member:
    """One axis of a parameter, and which of its indices belong to which module.

    Attributes:
        index: the module of each index; -1 for none.
        roles: what these weights do: "writer", "reader", "follower".
    """

    index: np.ndarray
    roles: set[str]


class _Affine(nn.Module):
    """A BatchNorm's gain and bias alone."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, shape (N, C, ...), scaled and shifted channel by channel."""
        if self.weight is None or self.bias is None:
            return x
        shape = (1, -1, *(1 for _ in range(x.ndim - 2)))
        return x * self.weight.reshape(shape) + self.bias.reshape(shape)


class Blueprint:
    """The graph of a network, and which entry of which constant is which weight.

    Args:
        model: the network; it is left as it is.
        example_inputs: as `etp_deploy.exporting.export` takes them.
        exporter: "torchscript" or "dynamo".
        dynamic: axes of free size.

    Raises:
        ExportError: the exporter fails, or the network has more weights than can be numbered.
        UsageError: an option cannot be meant.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        exporter: str = "torchscript",
        dynamic: Sequence[str] = (),
    ) -> None:
        if exporter not in EXPORTERS:
            raise UsageError(f"unknown exporter {exporter!r}", where="exporter", hint=f"one of {EXPORTERS}")
        self.shapes = {name: tuple(weight.shape) for name, weight in named_parameters(model)}
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values()]
        self.offsets = dict(zip(self.shapes, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.total = sum(sizes)
        if self.total > _MOST:
            raise ExportError(
                f"{self.total} weights are more than can be numbered", where=type(model).__name__
            )
        twin = _numbered(model)
        inputs = torch.utils._pytree.tree_map(_plain, example_inputs)  # noqa: SLF001 - knows all containers
        call = make_call(twin, inputs, dynamic, None)
        with tempfile.TemporaryDirectory(prefix="etp-deploy-") as folder, evaluating(twin), torch.no_grad():
            traced = trace(
                twin, call, output_names=None, opset=_OPSETS[exporter], exporter=exporter, folder=folder
            )
            self.graph: ir.Graph = prepare(traced).graph
        self._ids = {
            value: ids
            for value in self.graph.initializers.values()
            if is_parameter(value) and (ids := self._identify(value)) is not None
        }

    def _identify(self, value: ir.Value) -> np.ndarray | None:
        """Return the number of each entry of a constant, -1 where it bears none; None where none does."""
        array = None if value.const_value is None else value.const_value.numpy()
        if array is None or array.dtype != np.float32:
            return None
        bits = np.ascontiguousarray(array).view(np.int32)
        ids = np.where((bits >= _FIRST) & (bits < _FIRST + self.total), bits - _FIRST, -1).astype(np.int32)
        return ids if (ids >= 0).any() else None

    def analysis(self, zero: np.ndarray | None = None) -> Analysis:
        """Return the graph's analysis, before its fixpoint, with some weights zero.

        Args:
            zero: which weights, by number; None for none.
        """
        if zero is None:
            return read(self.graph)
        kept: dict[ir.Value, Any] = {}
        for value, ids in self._ids.items():
            gone = zero[ids] & (ids >= 0)
            if gone.any():
                kept[value] = value.const_value
                assert value.const_value is not None
                array = np.where(gone, np.float32(0), value.const_value.numpy())
                value.const_value = ir.tensor(array, name=value.name)
        try:
            return read(self.graph)
        finally:
            for value, tensor in kept.items():
                value.const_value = tensor

    def check(self, model: nn.Module) -> None:
        """Refuse another network than the one that this was made of, or one like it.

        Raises:
            UsageError: its parameters have other names or shapes.
        """
        if {name: tuple(weight.shape) for name, weight in named_parameters(model)} != self.shapes:
            hint = "make it of this network"
            raise UsageError("the blueprint is of another network", where=type(model).__name__, hint=hint)

    def zeros_of(self, model: nn.Module) -> np.ndarray:
        """Return which weights of a network are exactly zero, by number, shape (total,), bool.

        Raises:
            UsageError: the blueprint is of another network.
        """
        self.check(model)
        flat = [whole(weight.detach() == 0).reshape(-1) for _, weight in named_parameters(model)]
        return torch.cat([part.cpu() for part in flat]).numpy()

    def removed(self, zero: np.ndarray) -> tuple[np.ndarray, Analysis]:
        """Return which weights the surgery removes, by number, and the solved analysis.

        Args:
            zero: which weights are zero, by number.
        """
        analysis = self.analysis(zero)
        solve(analysis)
        lines: Lines = {}
        code_edits(analysis, 0, lines)
        codes = {value: (~mask).astype(np.uint64) for value, mask in analysis.state.keep.items()}
        uses: dict[tuple[ir.Value, ir.Node], list[Line]] = {
            (value, node): [] for value in self._ids for node, _ in value.uses()
        }
        for line in (*lines.values(), *contraction_lines(analysis, codes)):
            if (line.value, line.node) in uses:
                uses[line.value, line.node].append(line)
        # a weight goes where no node keeps it; the last place takes entries that bear no number
        seen, kept = np.zeros(self.total + 1, bool), np.zeros(self.total + 1, bool)
        for (value, _), own in uses.items():
            ids = self._ids[value].reshape(-1)
            cut = np.zeros(ids.shape, bool)
            for line in own:
                cut |= self._spread(line)[1] != 0
            seen[ids] = True
            kept[ids[~cut]] = True
        return (seen & ~kept)[:-1], analysis

    def price(self, zero: np.ndarray) -> Price:
        """Return what the network costs once the surgery has removed what zero weights make dead.

        Args:
            zero: which weights are zero, by number; see `zeros_of`.
        """
        gone, analysis = self.removed(zero)
        sizes = counting_sizes(self.graph)
        macs = 0.0
        for node, says in analysis.statements.items():
            dense = node_macs(node, sizes) or 0
            if dense:
                macs += dense * _share(says, analysis)
        return Price(self.total - int(gone.sum()), round(macs))

    def _spread(self, line: Line) -> tuple[np.ndarray, np.ndarray]:
        """Return the number and the word of every entry of a line's constant, flat."""
        ids = self._ids[line.value]
        shape = [size if axis in line.axes else 1 for axis, size in enumerate(ids.shape)]
        words = np.broadcast_to(line.words.reshape(shape), ids.shape)
        return ids.reshape(-1), words.reshape(-1)

    def decode(self, lines: Sequence[Line], modules: Mapping[int, int]) -> dict[tuple[str, int], Member]:
        """Return which indices of the parameters' axes belong to which module.

        Args:
            lines: of a `Coupling`.
            modules: the module of each word.

        Returns:
            A member for each parameter and axis that has any. An index has a module where all of its weights do,
            wherever they are used.
        """
        blocked = self._blocked(lines)
        found: dict[tuple[str, int], Member] = {}
        for line in lines:
            if line.value not in self._ids or line.words.size == 1:  # one entry lies along every axis
                continue
            # what goes with no module is an entry of its own, so that it is seen along which axis the line lies
            flat = line.words.reshape(-1)
            own = np.array([modules.get(int(w), -2 - place) for place, w in enumerate(flat)], np.int64)
            ids, module = self._spread(replace(line, words=own.reshape(line.words.shape)))
            for name, inside in self._split(ids):
                if name not in blocked:
                    self._note(found, name, line.role, ids[inside], module[inside])
        for member in found.values():
            member.index[member.index == _FAR] = -1
        return {key: member for key, member in found.items() if (member.index >= 0).any()}

    def _note(
        self, found: dict[tuple[str, int], Member], name: str, role: str, ids: np.ndarray, module: np.ndarray
    ) -> None:
        """Note the modules along the axis of a parameter that a line lies along, if it does along one."""
        shape = self.shapes[name]
        for axis, coordinate in enumerate(np.unravel_index(ids - self.offsets[name], shape)):
            low, high = np.full(shape[axis], _FAR), np.full(shape[axis], -_FAR)
            np.minimum.at(low, coordinate, module)
            np.maximum.at(high, coordinate, module)
            covered = low < _FAR
            if (low[covered] != high[covered]).any():
                continue
            index = np.where(covered, np.maximum(low, -1), _FAR)
            member = found.setdefault((name, axis), Member(np.full(shape[axis], _FAR), set()))
            both = covered & (member.index < _FAR)
            index[both & (index != member.index)] = -1
            member.index[covered] = index[covered]
            if (index[covered] >= 0).any():
                member.roles.add(role)

    def _split(self, ids: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each parameter that has entries among these, and where."""
        starts = np.array([*self.offsets.values()])
        owner = np.where(ids >= 0, np.searchsorted(starts, ids, side="right") - 1, -1)
        names = [*self.offsets]
        for number in np.unique(owner[owner >= 0]):
            # a parameter without entries starts where the next one does
            yield names[number], np.flatnonzero(owner == number)

    def _blocked(self, lines: Sequence[Line]) -> set[str]:
        """Return the parameters that are also read by a node which lets nothing go."""
        seen = {(line.value, line.node) for line in lines}
        blocked: set[str] = set()
        for value, ids in self._ids.items():
            if any((value, node) not in seen for node, _ in value.uses()):
                blocked.update(name for name, _ in self._split(ids.reshape(-1)))
        return blocked


def _share(says: object, analysis: Analysis) -> float:
    """Return which share of a node's multiply-accumulates stays."""
    state = analysis.state
    if isinstance(says, Contraction) and says.active:
        kept = says.kept_inputs(state).sum(axis=1) * says.kept_outputs(state).sum(axis=1)
        groups, outputs, inputs = says.reads.shape
        return float(kept.sum() / (groups * outputs * inputs))
    if isinstance(says, Contraction):
        return 1.0
    masks = [state.mask(value) for value in getattr(says, "operands", ())]
    return float(min((mask.mean() for mask in masks), default=1.0))


def _numbered(model: nn.Module) -> nn.Module:
    """Copy a network to the CPU, with numbers for weights and without statistics."""
    twin = plain_copy(model).cpu().float()
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BATCH_NORMS):
                setattr(module, name, _Affine(child))
    if isinstance(twin, BATCH_NORMS):
        twin = _Affine(twin)
    first = _FIRST
    with torch.no_grad():
        for weight in twin.parameters():
            bits = torch.arange(first, first + weight.numel(), dtype=torch.int32)
            weight.copy_(bits.view(torch.float32).reshape(weight.shape))
            first += weight.numel()
    return twin


def _plain(value: Any) -> Any:
    """Bring a tensor to the CPU, in float32 where it is floating."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
