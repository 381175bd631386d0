"""Declarations of modules that a discovery cannot see: heads of other layouts, gated neurons, units, columns.

Each returns a `Group`; what they say by hand, `coupled_groups` finds by itself where the network can be exported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.errors import ModelError
from etp_deploy.training.modules import Group, Part
from etp_deploy.training.wrapping import named_parameters, parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def gated_neurons(name: str, gates: Sequence[str], down: str) -> Group:
    """Declare the neurons of a gated perceptron: a row of each gate and the column that reads their product.

    Args:
        name: the group's name.
        gates: names of the linear layers that are multiplied, such as "gate_proj" and "up_proj"; a neuron is dead
            once its row in one of them is zero (if no bias keeps it alive).
        down: name of the linear layer that reads them.
    """
    parts = tuple(Part(f"{layer}.weight") for layer in gates)
    return Group(name, "neurons", (*parts, Part(f"{down}.weight", axis=1)))


def key_value_groups(
    name: str, projections: Sequence[str], output: str, *, groups: int, queries: int, head_dim: int
) -> Group:
    """Declare the groups of grouped-query attention: a key and a value head with all of its queries.

    Args:
        name: the group's name.
        projections: names of the query, key and value layers, in this order.
        output: name of the layer that reads the heads.
        groups: number of key and value heads.
        queries: query heads of each.
        head_dim: rows of each head.

    Raises:
        ModelError: not exactly three projections were named.
    """
    if len(projections) != 3:
        raise ModelError(f"{len(projections)} projections, want query, key and value", where=name)
    many, one = (groups, queries, head_dim), (groups, head_dim)
    query, key, value = projections
    return Group(
        name,
        "heads",
        (
            Part(f"{query}.weight", split=many, decisive=False),
            Part(f"{key}.weight", split=one, decisive=False),
            Part(f"{value}.weight", split=one),
            Part(f"{output}.weight", axis=1, split=many),
        ),
    )


def transposed_heads(name: str, packed: str, output: str, *, heads: int, head_dim: int) -> Group:
    """Declare attention heads of weights of shape (in, out), as GPT-2's `Conv1D` has them.

    Args:
        name: the group's name.
        packed: name of the layer whose columns are ordered (3, heads, head_dim).
        output: name of the layer whose rows read the heads.
        heads: number of heads.
        head_dim: columns of each head in each of query, key and value.
    """
    split = (3, heads, head_dim)
    columns = tuple(
        Part(f"{packed}.weight", axis=1, split=split, position=1, section=i, decisive=i == 2)
        for i in range(3)
    )
    return Group(name, "heads", (*columns, Part(f"{output}.weight", split=(heads, head_dim))))


def head_dimensions(name: str, value: str, output: str, *, heads: int, head_dim: int) -> Group:
    """Declare the dimensions inside heads as modules: one dimension of the value in every head.

    Heads are of one size, so that a dimension goes from all of them or from none.

    Args:
        name: the group's name.
        value: name of the value layer, of heads * head_dim rows.
        output: name of the layer that reads the heads, of heads * head_dim columns.
        heads: number of heads.
        head_dim: dimensions of each, the modules.
    """
    split = (heads, head_dim)
    rows = Part(f"{value}.weight", split=split, position=1)
    return Group(name, "dimensions", (rows, Part(f"{output}.weight", axis=1, split=split, position=1)))


def graph_heads(
    name: str, projection: str, attention: Sequence[tuple[str, int]], *, heads: int, channels: int
) -> Group:
    """Declare the heads of a graph attention layer.

    Args:
        name: the group's name.
        projection: name of the linear layer of heads * channels rows.
        attention: names of the attention vectors, and the axis of each that counts heads (`att_src` of shape
            (1, heads, channels): 1).
        heads: number of heads.
        channels: rows of each.
    """
    vectors = tuple(Part(vector, axis, decisive=False) for vector, axis in attention)
    return Group(name, "heads", (Part(f"{projection}.weight", split=(heads, channels)), *vectors))


def recurrent_units(name: str, model: nn.Module, layer: str, number: int = 0) -> Group:
    """Declare the hidden units of one layer of an `nn.LSTM`, `nn.GRU` or `nn.RNN`, in both directions.

    A unit is a row of each gate in the weights and biases, the column of the recurrence that reads it, and the
    column of the next layer that does. It is dead once all rows of its gates are zero, biases included.

    Args:
        name: the group's name.
        model: the network, read for names and shapes.
        layer: name of the recurrent module.
        number: which of its layers.

    Raises:
        ModelError: there is no such layer.
    """
    names = [found for found, _ in named_parameters(model)]
    parts: list[Part] = []
    deciding: list[int] = []
    for suffix in ("", "_reverse"):
        hidden = f"{layer}.weight_hh_l{number}{suffix}"
        if hidden not in names:
            continue
        rows, units = parameter(model, hidden).shape
        split = (rows // units, units)
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            made = f"{layer}.{kind}_l{number}{suffix}"
            if made in names:
                deciding.append(len(parts))
                parts.append(Part(made, split=split, position=1, decisive=False))
        parts.append(Part(hidden, axis=1, decisive=False))
    if not parts:
        raise ModelError("there is no such recurrent layer", where=f"{layer}, layer {number}")
    directions = 2 if f"{layer}.weight_hh_l{number}_reverse" in names else 1
    for suffix in ("", "_reverse"):
        following = f"{layer}.weight_ih_l{number + 1}{suffix}"
        if following in names:
            units = parameter(model, following).shape[1] // directions
            parts.append(Part(following, axis=1, split=(directions, units), position=1, decisive=False))
    return Group(name, "units", tuple(parts), deciding=(tuple(deciding),))


def embedding_columns(
    name: str, tables: Sequence[str], readers: Sequence[str], writers: Sequence[str] = ()
) -> Group:
    """Declare the columns of embedding tables that are added up, with the layers that read and write the sum.

    A column is dead once it is zero in all tables and in all writers, or once no reader reads it.

    Args:
        name: the group's name.
        tables: names of the tables, of shape (entries, columns).
        readers: names of the linear layers that read the sum by their columns.
        writers: names of the linear layers that add to it by their rows.
    """
    parts = [
        *(Part(f"{table}.weight", axis=1, decisive=False) for table in tables),
        *(Part(f"{layer}.weight", decisive=False) for layer in writers),
        *(Part(f"{layer}.weight", axis=1, decisive=False) for layer in readers),
    ]
    made = len(tables) + len(writers)
    sets = (tuple(range(made)), tuple(range(made, len(parts))))
    return Group(name, "channels", tuple(parts), deciding=tuple(chosen for chosen in sets if chosen))


def transposed_filters(name: str, layer: str) -> Group:
    """Declare the filters of a transposed convolution; of a grouped one, the same filter of every group together.

    Groups are of one size, so that a filter goes from all of them or from none.

    Args:
        name: the group's name.
        layer: name of the transposed convolution, whose weight has the shape (in, out of a group, kernel...).
    """
    return Group(name, "channels", (Part(f"{layer}.weight", axis=1),))
