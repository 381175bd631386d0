"""Networks in float16, bfloat16 and double: the same channels go as in float32, and the answers stay."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import Case, run, shrunk
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_surgery_regressions import Net

HALF, BRAIN, DOUBLE = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64)
# units in the last place of the type, relative to the output's largest entry
ROUNDING = {HALF: 2.0**-10, BRAIN: 2.0**-7, DOUBLE: 1e-13}
TYPES = pytest.mark.parametrize("dtype", [HALF, BRAIN, DOUBLE], ids=lambda dtype: dtype.name)


def convolutional():
    """Three convolutions with BatchNormalization; half of the channels hold constants, some of them not zero."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 3, 3, dead=(1, 2, 5)) / 5, net.rand(8)], "c1", pads=[1] * 4)
    net.node(
        "BatchNormalization", ["c1", net.rand(8), net.rand(8), net.rand(8), net.rand(8) ** 2 + 0.5], "n1"
    )
    net.node("Relu", ["n1"], "r1")
    net.node("Conv", ["r1", net.rand(8, 8, 3, 3, dead=(0, 3, 4, 7)) / 8, net.rand(8)], "c2", pads=[1] * 4)
    net.node("Sigmoid", ["c2"], "s2")
    net.node("Conv", ["s2", net.rand(6, 8, 1, 1, dead=(2,)) / 3, net.rand(6)], "c3")
    net.node("GlobalAveragePool", ["c3"], "g")
    net.node("Flatten", ["g"], "f")
    net.node("Gemm", ["f", net.rand(5, 6), net.rand(5)], "y", transB=1)
    return net.case("y", opset=22), {"c1": (6, 3, 3, 3), "c2": (4, 6, 3, 3), "c3": (5, 4, 1, 1), "y": (5, 5)}


def mlp():
    """Dead neurons behind every kind of bias."""
    net = Net(x=(3, 6))
    net.node("MatMul", ["x", net.rand(6, 12, dead=(1, 2, 9), axis=1)], "m1")
    net.node("Add", ["m1", net.rand(12)], "a1")
    net.node("Tanh", ["a1"], "t1")
    net.node("Gemm", ["t1", net.rand(10, 12, dead=(0, 4)) / 4, net.rand(10)], "g2", transB=1)
    net.node("Sigmoid", ["g2"], "s2")
    net.node("MatMul", ["s2", net.rand(10, 4) / 3], "y")
    return net.case("y", opset=22), {"m1": (6, 9), "g2": (8, 9), "y": (8, 4)}


def attention():
    """Two heads of four, of which one has no values, and two channels of queries and keys are dead."""
    net = Net(x=(2, 5, 8))
    head = net.rand(8, 8, dead=(1, 4, 5, 6, 7), axis=1), net.rand(8, 8, dead=(4, 5, 6, 7), axis=1)
    for name, weight in zip("qkv", (head[0], head[0][::-1] * 0.7, head[1]), strict=True):
        net.node("MatMul", ["x", weight / 3], f"{name}m")
        net.node("Reshape", [f"{name}m", np.array([0, 0, 2, 4])], f"{name}r")
        net.node("Transpose", [f"{name}r"], f"{name}h", perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3])
    net.node("MatMul", ["qh", "kh"], "scores")
    net.node("Softmax", ["scores"], "p", axis=-1)
    net.node("MatMul", ["p", "vh"], "o")
    net.node("Transpose", ["o"], "ot", perm=[0, 2, 1, 3])
    net.node("Reshape", ["ot", np.array([0, 0, 8])], "or")
    net.node("MatMul", ["or", net.rand(8, 8) / 3], "z")
    net.node("Add", ["x", "z"], "y")
    return net.case("y", opset=22), {"qm": (8, 3), "km": (8, 3), "vm": (8, 4), "z": (4, 8)}


NETWORKS = pytest.mark.parametrize(
    "network", [convolutional, mlp, attention], ids=lambda build: build.__name__
)


def converted(case, dtype):
    """Return a case with all floating-point numbers in another type."""
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    for item in model.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(dtype), item.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return Case(model, {name: array.astype(dtype) for name, array in case.feeds.items()})


def answers(case, model):
    """Run a model: by ONNX Runtime, or by the reference where that has no kernels."""
    if any(array.dtype in {BRAIN, DOUBLE} for array in case.feeds.values()):
        return ReferenceEvaluator(model).run(None, case.feeds)
    return run(model, case.feeds)


def shapes(model):
    """Return the shape of each contraction's weight, by its output's name without what folding adds to it."""
    held = {item.name: tuple(item.dims) for item in model.graph.initializer}
    held |= {node.output[0]: held[node.input[0]] for node in model.graph.node if node.input[0] in held}
    return {
        node.output[0].removesuffix("_without_constant"): held[node.input[1]]
        for node in model.graph.node
        if node.op_type in {"Conv", "Gemm", "MatMul"} and node.input[1] in held
    }


@NETWORKS
@TYPES
def test_the_same_goes_in_every_type(network, dtype):
    """Exactly what is dead is removed, nothing changes its type, and the answer is the same to rounding."""
    case, expected = network()
    assert shapes(shrunk(case.model)) == expected
    case = converted(case, dtype)
    result = shrunk(case.model)
    assert shapes(result) == expected
    kinds = {item.data_type for item in result.graph.initializer} - {onnx.TensorProto.INT64}
    assert kinds == {helper.np_dtype_to_tensor_dtype(dtype)}
    for one, other in zip(answers(case, case.model), answers(case, result), strict=True):
        assert one.dtype == other.dtype == dtype
        wide = one.astype(np.float64)
        worst = np.abs(wide - other.astype(np.float64)).max()
        assert worst <= 4 * ROUNDING[dtype] * np.abs(wide).max()


def test_a_softmax_in_float32_between_casts():
    """Mixed precision: attention over constant values is constant, though its weights pass through Casts."""
    case, expected = attention()
    for node in case.model.graph.node:
        if node.output[0] == "vm":  # a head whose values are constants other than zero
            node.output[0] = "unbiased"
    bias = numpy_helper.from_array(np.linspace(0.5, 1, 8).astype(np.float32), "bias")
    place = next(i for i, node in enumerate(case.model.graph.node) if node.output[0] == "unbiased")
    case.model.graph.node.insert(place + 1, helper.make_node("Add", ["unbiased", "bias"], ["vm"]))
    case.model.graph.initializer.append(bias)
    case = converted(case, HALF)
    softmax = next(i for i, node in enumerate(case.model.graph.node) if node.op_type == "Softmax")
    case.model.graph.node[softmax].input[0], case.model.graph.node[softmax].output[0] = "wide", "widep"
    case.model.graph.node.insert(
        softmax + 1, helper.make_node("Cast", ["widep"], ["p"], to=onnx.TensorProto.FLOAT16)
    )
    case.model.graph.node.insert(
        softmax, helper.make_node("Cast", ["scores"], ["wide"], to=onnx.TensorProto.FLOAT)
    )
    result = shrunk(case.model)
    assert shapes(result) == {
        **{key: value for key, value in expected.items() if key != "vm"},
        "unbiased": (8, 4),
    }
    for one, other in zip(run(case.model, case.feeds), run(result, case.feeds), strict=True):
        worst = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
        assert worst <= 4 * ROUNDING[HALF] * np.abs(one.astype(np.float64)).max()


@NETWORKS
@pytest.mark.parametrize("dtype", [HALF, BRAIN, DOUBLE], ids=lambda dtype: dtype.name)
def test_weights_that_are_stored_in_another_type(network, dtype):
    """A Cast between the weight and its reader: the stored weight is cut, in its own type, to the same size."""
    case, expected = network()
    model, nodes = onnx.ModelProto.FromString(case.model.SerializeToString()), []
    narrow = set()
    for item in model.graph.initializer:
        array = numpy_helper.to_array(item)
        if array.ndim >= 2:
            item.CopyFrom(numpy_helper.from_array(array.astype(dtype), f"{item.name}_stored"))
            name = item.name.removesuffix("_stored")
            nodes.append(helper.make_node("Cast", [item.name], [name], to=onnx.TensorProto.FLOAT))
            narrow.add(item.name)
    given = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *given])
    result = shrunk(model)
    kinds = {item.name: item.data_type for item in result.graph.initializer}
    assert {kinds[name] for name in narrow} == {helper.np_dtype_to_tensor_dtype(dtype)}
    if network is convolutional:
        # no carrier: its weight would be a new one, which the narrow type does not hold
        expected |= {"c1": (7, 3, 3, 3), "c2": (4, 7, 3, 3)}
    assert shapes(result) == expected
    for one, other in zip(run(model, case.feeds), run(result, case.feeds), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()
