"""What can be pruned as one piece: filters, neurons and whole heads, discovered or declared.

A *group* is one prunable axis of a network: `count` modules (channels, neurons or heads), each made of the
same slices of one or several parameters. Everything else in this package works on groups alone, so a
structure that the discovery does not know needs a declaration and nothing more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from etp_deploy.errors import ModelError
from etp_deploy.training.wrapping import named_modules, parameter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from etp_deploy.training.forces import Pivot

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: every norm that computes a channel's statistics over the batch and has a gain and a bias for each channel
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Part:
    """One parameter's share in a group: how one of its axes reads as modules.

    The axis, of size S, is viewed as `split` (whose product is S) and entry `position` of that view counts
    the modules. A linear layer's rows are the plain case, `split` of None. The packed projection of 8 heads
    of 16 has 384 rows that read as (3, 8, 16) with the heads at position 1; its value rows alone are section
    2.

    Args:
        parameter: the parameter's name, as in `model.named_parameters()`.
        axis: the axis of the parameter that holds modules.
        split: the view of that axis; None when each index is a module.
        position: which entry of `split` counts modules.
        section: the one index of the first entry of `split` that the part takes; None for all of them.
        decisive: whether a module computes a constant, or is read by nobody, once this part alone is zero:
            true of a filter, a norm's gain, the value rows and the output columns of a head; false of biases,
            and of the query and key rows, whose zeros leave a uniform attention.
        index: in place of `split`, `position` and `section`: the module of each index along the axis, -1 for one
            that belongs to none. Any layout can be said so: a concatenation's offsets, interleaved heads.
    """

    parameter: str
    axis: int = 0
    split: tuple[int, ...] | None = None
    position: int = 0
    section: int | None = None
    decisive: bool = True
    index: tuple[int, ...] | None = None

    def modules(self, tensor: Tensor) -> Tensor:
        """Return the module of each index along the axis, -1 for none, shape (S,), int64, on the CPU.

        Args:
            tensor: the parameter, or anything of its shape.

        Raises:
            ModelError: the tensor has no such axis, `split` does not multiply to its size, `position` or `section`
                lies outside it, or `index` does not have its length.
        """
        if self.index is None:
            split = self._split(tensor)
            places = torch.arange(math.prod(split)).reshape(split)
            after = math.prod(split[self.position + 1 :])
            modules = (places // after) % split[self.position]
            if self.section is not None:
                outside = places // math.prod(split[1:]) != self.section
                modules = modules.masked_fill(outside, -1)
            return modules.reshape(-1)
        self._check_axis(tensor)
        if len(self.index) != tensor.shape[self.axis]:
            raise ModelError(
                f"axis {self.axis} of size {tensor.shape[self.axis]} has {len(self.index)} indices",
                where=self.parameter,
            )
        return torch.tensor(self.index, dtype=torch.int64)

    def _check_axis(self, tensor: Tensor) -> None:
        if not 0 <= self.axis < tensor.ndim:
            raise ModelError(
                f"there is no axis {self.axis} in shape {tuple(tensor.shape)}", where=self.parameter
            )

    def _split(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the checked `split`."""
        self._check_axis(tensor)
        size = tensor.shape[self.axis]
        split = self.split or (size,)
        lowest = 0 if self.section is None else 1
        if math.prod(split) != size or not lowest <= self.position < len(split):
            raise ModelError(
                f"axis {self.axis} of size {size} does not read as {split} with modules at {self.position}",
                where=self.parameter,
            )
        if self.section is not None and not 0 <= self.section < split[0]:
            raise ModelError(f"there is no section {self.section} in {split}", where=self.parameter)
        return split


@dataclass(frozen=True)
class Group:
    """Modules that lie along one prunable axis, each the union of its slices of all parts.

    Args:
        name: unique in a regulariser; statistics are reported under it.
        kind: what a module is called: "channels", "neurons", "heads", or a word of the author's own.
        parts: the parameters concerned; they all count the same number of modules.
        pivot: the module that torque is measured from, in place of the regulariser's.
        deciding: sets of positions in `parts`; a module is dead once every part of one set is zero in it. Empty:
            each decisive part is a set of its own, or where there is none, all parts together are one.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    pivot: Pivot | None = None
    deciding: tuple[tuple[int, ...], ...] = ()

    def deciding_sets(self) -> tuple[tuple[int, ...], ...]:
        """Return the sets of parts whose zeros make a module dead."""
        single = tuple((place,) for place, part in enumerate(self.parts) if part.decisive)
        return self.deciding or single or (tuple(range(len(self.parts))),)

    def count(self, model: nn.Module) -> int:
        """Return how many modules the group has.

        Raises:
            ModelError: the group has no parts, a part does not exist or does not fit its parameter, or parts
                disagree about the number of modules.
        """
        counts: set[int] = set()
        least = 0
        for part in self.parts:
            modules = part.modules(parameter(model, part.parameter))
            found = int(modules.max()) + 1 if len(modules) else 0
            if part.index is None:
                counts.add(found)
            least = max(least, found)
        if len(counts | {least}) != 1 and (counts or not self.parts):
            raise ModelError(f"its parts count {sorted(counts | {least})} modules", where=self.name)
        return least


def neurons(name: str, first: str, second: str | None = None) -> Group:
    """Declare the hidden neurons between two linear layers as modules.

    Args:
        name: the group's name.
        first: name of the linear layer whose rows are the neurons.
        second: name of the linear layer that reads them by its columns, made part of the module when given: a
            neuron is removable when either is zero.
    """
    parts: tuple[Part, ...] = (Part(f"{first}.weight"),)
    if second is not None:
        parts += (Part(f"{second}.weight", axis=1),)
    return Group(name, "neurons", parts)


def packed_heads(name: str, qkv: str, output: str, heads: int, head_dim: int) -> Group:
    """Declare attention heads with one packed projection whose rows are ordered (3, heads, head_dim).

    Such are timm's `qkv` and `nn.MultiheadAttention`'s `in_proj_weight`.

    Args:
        name: the group's name.
        qkv: name of the packed weight, shape (3 * heads * head_dim, width).
        output: name of the weight that reads the heads, shape (width, heads * head_dim).
        heads: number of heads.
        head_dim: rows of each head in each of query, key and value.
    """
    split = (3, heads, head_dim)
    rows = tuple(Part(qkv, split=split, position=1, section=i, decisive=i == 2) for i in range(3))
    return Group(name, "heads", (*rows, Part(output, axis=1, split=(heads, head_dim))))


def separate_heads(name: str, projections: Sequence[str], output: str, heads: int, head_dim: int) -> Group:
    """Declare attention heads with separate projections for query, key and value.

    Args:
        name: the group's name.
        projections: names of the query, key and value layers, in this order, each of heads * head_dim rows.
        output: name of the layer that reads the heads, of heads * head_dim columns.
        heads: number of heads.
        head_dim: rows of each head in each projection.

    Raises:
        ModelError: not exactly three projections were named.
    """
    if len(projections) != 3:
        raise ModelError(f"{len(projections)} projections, want query, key and value", where=name)
    split = (heads, head_dim)
    rows = tuple(
        Part(f"{layer}.weight", split=split, decisive=index == 2) for index, layer in enumerate(projections)
    )
    return Group(name, "heads", (*rows, Part(f"{output}.weight", axis=1, split=split)))


def discover(
    model: nn.Module,
    *,
    exclude: Sequence[str] = (),
    include_bias: bool = False,
    include_norm: bool = False,
) -> tuple[Group, ...]:
    """Find the prunable modules of a network: filters, neurons and whole heads, each layer a group.

    Found are convolutions of any dimension, transposed ones that are not grouped, linear layers,
    `nn.MultiheadAttention`, and attention in the manner of timm (`num_heads`, `qkv`, `proj`). Parameters of
    an attention belong to its heads and are not offered again as neurons. Separate query, key and value
    layers cannot be told from other linear layers: declare them with `separate_heads` and exclude them here.

    Every layer is offered, as in the paper, whether or not what it zeroes can be removed later. The outputs
    of a classifier cannot: name it in `exclude`.

    Args:
        model: the network.
        exclude: names of layers, or of modules that hold layers, to leave out.
        include_bias: make a layer's bias part of its modules.
        include_norm: make the gain (and with `include_bias` the bias) of a BatchNorm part of the modules of
            the convolution or linear layer before it. Before it means: registered just before it, with as
            many channels. A filter in front of a BatchNorm is scale-free, its gain is not.

    Returns:
        The groups, in the order in which the network registers its layers.

    Raises:
        ModelError: `exclude` names something that the model does not have.
    """
    modules = dict(named_modules(model))
    for name in exclude:
        if name not in modules:
            raise ModelError("no such layer to exclude", where=name)
    taken = set(exclude)
    groups: list[Group] = []
    leaves = [name for name, module in modules.items() if not any(module.children())]
    for name, module in modules.items():
        if _inside(name, taken):
            continue
        heads = _attention(name, module, include_bias=include_bias)
        if heads is not None:
            groups.append(heads)
            taken.add(name)
            continue
        parts = list(_layer_parts(name, module, include_bias=include_bias))
        if parts and include_norm:
            parts += _norm_parts(modules, leaves, name, include_bias=include_bias)
        if parts:
            kind = "neurons" if isinstance(module, nn.Linear) else "channels"
            groups.append(Group(name, kind, tuple(parts)))
    return tuple(groups)


def batch_norm_gains(model: nn.Module) -> frozenset[str]:
    """Return the names of the gains of a network's BatchNorms."""
    return frozenset(
        _join(name, "weight") for name, module in named_modules(model) if isinstance(module, BATCH_NORMS)
    )


def _inside(name: str, taken: set[str]) -> bool:
    return any(not other or name == other or name.startswith(f"{other}.") for other in taken)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _layer_parts(name: str, module: nn.Module, *, include_bias: bool) -> Iterator[Part]:
    """Yield the parts of a convolution's filters or a linear layer's neurons; none for another module."""
    if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
        yield Part(_join(name, "weight"))
    elif isinstance(module, _TRANSPOSED) and module.groups == 1:
        yield Part(_join(name, "weight"), axis=1)
    else:
        return
    if include_bias and module.bias is not None:
        yield Part(_join(name, "bias"), decisive=False)


def _norm_parts(
    modules: dict[str, nn.Module], leaves: list[str], name: str, *, include_bias: bool
) -> Iterator[Part]:
    """Yield the gain and bias of the BatchNorm that is registered just after a layer and fits it."""
    following = leaves[leaves.index(name) + 1 :][:1]
    layer = modules[name]
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    for norm in following:
        module = modules[norm]
        if isinstance(module, BATCH_NORMS) and module.affine and module.num_features == width:
            yield Part(_join(norm, "weight"))
            if include_bias:
                yield Part(_join(norm, "bias"), decisive=False)


def _attention(name: str, module: nn.Module, *, include_bias: bool) -> Group | None:
    """Return the whole heads of an attention module, None when it is not one that is known."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(name, module, include_bias=include_bias)
    heads, qkv, proj = (getattr(module, attribute, None) for attribute in ("num_heads", "qkv", "proj"))
    if not (isinstance(heads, int) and isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)):
        return None
    head_dim = proj.in_features // heads
    if qkv.out_features != 3 * heads * head_dim:
        return None
    group = packed_heads(name, _join(name, "qkv.weight"), _join(name, "proj.weight"), heads, head_dim)
    bias = Part(_join(name, "qkv.bias"), split=(3, heads, head_dim), position=1, decisive=False)
    extra = (bias,) if include_bias and qkv.bias is not None else ()
    return Group(name, "heads", group.parts + extra)


def _multihead(name: str, module: nn.MultiheadAttention, *, include_bias: bool) -> Group:
    heads, head_dim = module.num_heads, module.head_dim
    packed, output = _join(name, "in_proj_weight"), _join(name, "out_proj.weight")
    if module.in_proj_weight is not None:
        parts = packed_heads(name, packed, output, heads, head_dim).parts
    else:
        weights = (("q_proj_weight", False), ("k_proj_weight", False), ("v_proj_weight", True))
        split = (heads, head_dim)
        parts = tuple(Part(_join(name, weight), split=split, decisive=value) for weight, value in weights)
        parts += (Part(output, axis=1, split=split),)
    if include_bias and module.in_proj_bias is not None:
        bias = Part(_join(name, "in_proj_bias"), split=(3, heads, head_dim), position=1, decisive=False)
        parts += (bias,)
    return Group(name, "heads", parts)
