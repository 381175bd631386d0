"""The ways in which a random graph grows: each step adds a few nodes that exporters or people write."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
from graphs import Builder, Case, Chooser, DrawnChooser, opsets, read_by, runs
from hypothesis import strategies as st
from moving_steps import (
    gathering,
    joining,
    reduction,
    repeating,
    reshaping,
    shuffling,
    slicing,
    softmax,
    splitting,
    transposing,
)
from onnx import helper, numpy_helper
from pointwise_steps import (
    activation,
    bounded,
    choosing,
    meeting,
    normalisation,
    residual,
    squeeze_and_excite,
    with_parameter,
)
from product_steps import attention, batched, between, dense, embedding, gated, gemm
from space_steps import convolution, padding, pooling, rearranging, resizing, transposed_convolution


def unknown(b: Builder) -> bool:  # noqa: PLR0911 - a list of kinds
    """An operator that moves or mixes in ways of its own."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    rank = b.rank(x)
    kind = b.choose.one_of(
        ("cumsum", "einsum", "lrn", "topk", "nonzero", "if", "onehot", "trilu", "argmax", "shape")
    )
    if kind == "cumsum":
        axis = b.initializer(np.array(b.choose.integer(1, rank - 1), np.int64), "k")
        return b.add(b.emit("CumSum", [x, axis]))
    if kind == "einsum" and rank == 3:
        weight = b.weight((b.shape(x)[2], 5), b.shape(x)[2], out=1, column=0)
        return b.add(b.emit("Einsum", [x, weight], equation="bld,de->ble"))
    if kind == "lrn" and rank == 4:
        return b.add(b.emit("LRN", [x], size=3))
    if kind == "topk":
        axis = b.choose.integer(1, rank - 1)
        first = b.emit("TopK", [x, b.ints(b.choose.integer(1, b.shape(x)[axis]))], 2, axis=axis)
        return b.add(first)
    if kind == "if":
        return _branching(b, x)
    if kind == "trilu":
        return b.add(b.emit("Trilu", [x]))
    if kind == "shape":
        sizes = b.emit("Shape", [x])
        return sizes is not None and b.add(b.emit("Cast", [sizes], to=onnx.TensorProto.FLOAT))
    if kind == "argmax":
        places = b.emit("ArgMax", [x], axis=b.choose.integer(1, rank - 1))
        return places is not None and b.add(b.emit("Cast", [places], to=onnx.TensorProto.FLOAT))
    return False


def _branching(b: Builder, x: str) -> bool:
    """An If whose branches read outer tensors."""
    y = b.choose.one_of([name for name in b.pool if b.shape(name) == b.shape(x)])
    condition = b.initializer(np.array(b.choose.chance(0.5)), "c")
    branches = {}
    for key, operator, source in (("then_branch", "Relu", x), ("else_branch", "Neg", y)):
        out = b.name("inner")
        branches[key] = helper.make_graph(
            [helper.make_node(operator, [source], [out])],
            key,
            [],
            [helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, [None] * b.rank(x))],
        )
    return b.add(b.emit("If", [condition], **branches))


STEPS = (
    *(convolution,) * 6,
    *(normalisation,) * 3,
    *(activation,) * 3,
    *(with_parameter,) * 3,
    *(meeting,) * 3,
    *(dense,) * 3,
    *(attention,) * 2,
    *(gemm,) * 2,
    *(pooling,) * 2,
    *(reshaping,) * 2,
    *(transposing,) * 2,
    *(
        transposed_convolution,
        padding,
        resizing,
        rearranging,
        bounded,
        residual,
        squeeze_and_excite,
        choosing,
    ),
    *(
        joining,
        splitting,
        slicing,
        gathering,
        shuffling,
        repeating,
        reduction,
        softmax,
        batched,
        between,
        gated,
    ),
    *(embedding, unknown),
    *(
        step
        for module in sorted(Path(__file__).parent.glob("steps_*.py"))
        for step in import_module(module.stem).STEPS
    ),
)
"""What a graph grows by, as often as it is listed; each file `steps_*.py` beside this one adds its own `STEPS`."""


def grown(choose: Chooser, seed: int) -> Case:
    """Return a random graph with dead structure that ONNX Runtime runs, and an input."""
    while True:
        case = _grown(choose, seed)
        # nodes that run one by one may not run together: the runtime's shape inference differs from its kernels
        if runs(case):
            return case


def _grown(choose: Chooser, seed: int) -> Case:
    b = Builder(choose, seed, choose.integer(13, 23))
    b.dynamic = choose.chance(0.3)
    kind = choose.one_of(("image", "image", "sequence", "vector", "signal", "volume"))
    shape = {
        "image": (2, 3, 6, 5),
        "sequence": (2, 5, 6),
        "vector": (2, 7),
        "signal": (2, 4, 9),
        "volume": (1, 2, 4, 3, 4),
    }[kind]
    _input(b, "x", b.random.standard_normal(shape).astype(np.float32))
    if choose.chance(0.25):
        _input(
            b, "unused" if choose.chance(0.3) else "x2", b.random.standard_normal(shape).astype(np.float32)
        )
    if kind == "sequence":
        _input(b, "ids", b.random.integers(0, 11, (2, 5)))
    wanted = choose.integer(2, 14)
    tries = 0
    while wanted and tries < 60:
        tries += 1
        wanted -= int(choose.one_of(STEPS)(b))
    return _finished(b)


def _input(b: Builder, name: str, array: np.ndarray) -> None:
    b.values[name] = array
    b.inputs[name] = ("N", *array.shape[1:]) if b.dynamic else array.shape
    if array.dtype == np.float32 and name != "unused":
        b.pool.append(name)


def _finished(b: Builder) -> Case:
    """Choose the outputs: what nothing reads, and now and then something in the middle."""
    read = set().union(*(read_by(node) for node in b.nodes))
    made = [name for node in b.nodes for name in node.output if name]
    ends = [name for name in made if name not in read and b.values[name].dtype == np.float32]
    if len(ends) > 2 and b.choose.chance(0.5):
        ends = ends[-2:]
    if made and b.choose.chance(0.15):
        ends.append(b.choose.one_of(made))
    ends = [_read(b, name) for name in dict.fromkeys(ends)]
    outputs = list(dict.fromkeys(ends)) or [b.emit("Identity", ["x"]) or "x"]
    used = set().union(*(read_by(node) for node in b.nodes))
    graph = helper.make_graph(
        b.nodes,
        "random",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(b.values[name].dtype), shape)
            for name, shape in b.inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(b.values[name].dtype), None)
            for name in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in b.initializers.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=opsets(b.opset), ir_version=8)
    return Case(model, {name: b.values[name] for name in b.inputs})


def _read(b: Builder, name: str) -> str:
    """Let a last layer read an end, mostly, so that its channels are none of the model's outputs."""
    if b.rank(name) < 2 or b.choose.chance(0.2):
        return name
    if b.rank(name) in {3, 4} and b.choose.chance(0.6):
        size = b.shape(name)[1]
        weight = b.weight((3, size, *([1] * (b.rank(name) - 2))), size, column=1)
        return b.emit("Conv", [name, weight]) or name
    return b.linear(name, 3) or name


@st.composite
def graphs(draw: st.DrawFn) -> Case:
    """Draw a random graph with dead structure, and an input for it."""
    return grown(DrawnChooser(draw), draw(st.integers(0, 2**20)))
