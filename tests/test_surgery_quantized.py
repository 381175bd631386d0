"""Quantised networks: what is dead in the float network goes, with its scales, and integers stay what they were."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Case, difference, failure, run, shrunk
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from test_surgery_regressions import Net

import etp_deploy
from etp_deploy.inspection import explain
from etp_deploy.sizes import count_macs
from etp_deploy.surgery.statements.packed import packed_rows, unpacked
from etp_deploy.surgery.statements.quantized import IntegerContraction
from etp_deploy.surgery.stored import Step, Stored
from etp_deploy.surgery.thresholds import newly_dead, with_zeros

MICROSOFT = "com.microsoft"


# networks


def convolutional(pads):
    """Two convolutions; of the first's dead channels two are zero behind the Relu, and three are not."""
    net = Net(x=(2, 3, 8, 8))
    bias = np.array([0.3, -0.4, 0.5, -0.1, 0.2, 0.5, 0.6, -0.7], np.float32)
    net.node("Conv", ["x", net.rand(8, 3, 3, 3, dead=(1, 2, 5, 6, 7)) / 5, bias], "c1", pads=[1] * 4)
    net.node("Relu", ["c1"], "r1")
    weight = net.rand(6, 8, 3, 3, dead=(0, 3)) / 8
    net.node("Conv", ["r1", weight, net.rand(6) + 0.5], "c2", pads=[pads] * 4)
    net.node("Relu", ["c2"], "r2")
    net.node("GlobalAveragePool", ["r2"], "g")
    net.node("Flatten", ["g"], "f")
    net.node("Gemm", ["f", net.rand(6, 5), net.rand(5)], "y")
    return net.case("y", opset=17)


def mlp(operator):
    """Dead neurons in both hidden sizes, half of them with biases that the Relu lets through."""
    net = Net(x=(3, 6))
    first, second = (
        net.rand(6, 16, dead=(1, 2, 5, 7, 8, 9), axis=1),
        net.rand(16, 12, dead=(0, 3), axis=1) / 4,
    )
    sizes = [
        (first, np.where(np.arange(16) % 2, 0.3, -0.4)),
        (second, np.linspace(-1, 1, 12)),
        (net.rand(12, 5), np.ones(5)),
    ]
    sizes[2][0][4:7] = 0
    data = "x"
    for number, (weight, added) in enumerate(sizes, start=1):
        bias = added.astype(np.float32)
        if operator == "Gemm":
            net.node("Gemm", [data, weight, bias], f"a{number}")
        else:
            net.node("MatMul", [data, weight], f"m{number}")
            net.node("Add", [f"m{number}", bias], f"a{number}")
        data = f"r{number}"
        if number < len(sizes):
            net.node("Relu", [f"a{number}"], data)
    return net.case("a3", opset=17)


class Inputs(CalibrationDataReader):
    """Random inputs to calibrate with."""

    def __init__(self, case):
        self.left = [
            {
                name: np.random.default_rng(seed).standard_normal(array.shape).astype(np.float32)
                for name, array in case.feeds.items()
            }
            for seed in range(4)
        ]

    def get_next(self):
        """Return one more, None at the end."""
        return self.left.pop() if self.left else None


def quantised(case, folder, **options):
    """Quantise with ONNX Runtime's own tool, statically where a format is given."""
    onnx.save(case.model, folder / "float.onnx")
    if "quant_format" in options:
        quantize_static(folder / "float.onnx", folder / "q.onnx", Inputs(case), **options)
    else:
        quantize_dynamic(folder / "float.onnx", folder / "q.onnx", **options)
    return Case(onnx.load(folder / "q.onnx"), case.feeds)


def weights(model):
    """Return the shapes of the 8-bit matrices and kernels, in order of their names."""
    items = sorted(
        (item.name, tuple(item.dims)) for item in model.graph.initializer if item.data_type in {2, 3}
    )
    return [shape for _, shape in items if len(shape) > 1]


def equal_bits(case, result):
    """Assert that the outputs are the same to the last bit, with the runtime's optimisations and without."""
    for optimised in (False, True):
        expected = run(case.model, case.feeds, optimised=optimised)
        got = run(result, case.feeds, optimised=optimised)
        assert all(np.array_equal(one, other) for one, other in zip(expected, got, strict=True))


def operators(model):
    """Return how many nodes of each kind a model has."""
    return Counter(node.op_type for node in model.graph.node)


FORMATS = pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
TYPES = {
    "u8s8": (QuantType.QUInt8, QuantType.QInt8),
    "s8s8": (QuantType.QInt8, QuantType.QInt8),
    "u8u8": (QuantType.QUInt8, QuantType.QUInt8),
}


@FORMATS
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("scales", ["by channel", "by tensor"])
def test_convolutions_lose_what_is_dead(tmp_path, form, types, scales):
    """Constants fold into the 32-bit bias; where zero padding wants a carrier, those that are not zero stay."""
    activation, weight = TYPES[types]
    options = {"activation_type": activation, "weight_type": weight, "per_channel": scales == "by channel"}
    for pads, kept in ((0, 3), (1, 6)):
        case = quantised(convolutional(pads), tmp_path, quant_format=form, **options)
        result = shrunk(case.model)
        assert weights(result) == [(kept, 3, 3, 3), (4, kept, 3, 3), (4, 5)]
        equal_bits(case, result)
        assert operators(result) == operators(
            case.model
        )  # the bias is still quantised, and nothing was added


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
@FORMATS
def test_matrix_products_lose_what_is_dead(tmp_path, operator, form):
    """Of 16 neurons 10 live, of 12 seven; a QLinearMatMul has no bias for the constants that are not zero."""
    case = quantised(mlp(operator), tmp_path, quant_format=form, per_channel=True)
    result = shrunk(case.model)
    middle = 14 if operator == "MatMul" and form == QuantFormat.QOperator else 10
    assert weights(result) == [(6, middle), (middle, 7), (7, 5)]
    equal_bits(case, result)


@pytest.mark.parametrize("by_channel", [False, True])
def test_dynamically_quantised_networks_lose_zeros(tmp_path, by_channel):
    """A zero is in every range; another constant may set it and stays, as does what nothing reads."""
    case = quantised(mlp("MatMul"), tmp_path, per_channel=by_channel)
    result = shrunk(case.model)
    assert weights(result) == [(6, 14), (14, 10), (10, 5)]
    equal_bits(case, result)


def test_dynamically_quantised_convolutions_lose_zeros(tmp_path):
    """ConvInteger with the bias behind it: zeros alone go, and padding does not matter to them."""
    case = quantised(convolutional(1), tmp_path)
    result = shrunk(case.model)
    assert weights(result)[0] == (6, 3, 3, 3)
    equal_bits(case, result)


def test_compress_verifies_quantised_networks(tmp_path):
    """The whole job, simplification and verification included."""
    case = quantised(convolutional(0), tmp_path, quant_format=QuantFormat.QDQ, per_channel=True)
    report = etp_deploy.compress(tmp_path / "q.onnx", tmp_path / "small.onnx", align="off")
    assert report.verification is not None
    assert report.verification.max_abs_error == 0.0
    assert report.removed == {"channels": 7, "heads": 0, "neurons": 0}
    small = onnx.load(tmp_path / "small.onnx")
    assert weights(small) == [(3, 3, 3, 3), (4, 3, 3, 3), (4, 5)]
    assert {item.data_type for item in small.graph.initializer if len(item.dims) > 1} == {
        onnx.TensorProto.INT8
    }
    equal_bits(case, small)


@FORMATS
def test_the_work_of_quantised_networks_is_counted(tmp_path, form):
    """A quantised convolution multiplies as often as the one in floating point."""
    case = quantised(convolutional(0), tmp_path, quant_format=form)
    assert count_macs(ir.from_proto(case.model)) == 2 * (8 * 27 * 64 + 6 * 72 * 36 + 30)
    assert count_macs(ir.from_proto(shrunk(case.model))) == 2 * (3 * 27 * 64 + 4 * 27 * 36 + 20)


# weights behind DequantizeLinear


def small(*nodes, opset=21, dtype=onnx.TensorProto.FLOAT, **inputs):
    """Return a case from (operator, inputs, output, attributes); arrays among the inputs become initializers."""
    net = Net(**inputs)
    for operator, names, output, attributes in nodes:
        net.node(operator, names, output, **attributes)
    case = net.case(net.nodes[-1].output[0], opset=opset)
    case.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    case.model.ir_version = 10
    case.model.graph.output[0].type.tensor_type.elem_type = dtype
    return case


def grid(seed, *shape, zero=0, dead=(), axis=0, dtype=np.int8, largest=100):
    """Return random integers around a zero point, equal to it at some indices of an axis."""
    array = np.random.default_rng(seed).integers(-largest, largest, shape) + zero
    array[(slice(None),) * axis + (list(dead),)] = zero
    return array.astype(dtype)


def held(model, name):
    """Return an initializer by name."""
    return next(numpy_helper.to_array(item) for item in model.graph.initializer if item.name == name)


def shapes(model):
    """Return the shapes of all initializers, by name."""
    return {item.name: tuple(item.dims) for item in model.graph.initializer}


def test_a_weight_is_zero_where_it_is_the_zero_point():
    """Zero, scale and zero point by channel: dead are the columns at their own zero point, not those of zeros."""
    zeros = np.array([3, 0, 7, 1, 9, 0], np.uint8)
    weight = np.random.default_rng(0).integers(20, 255, (4, 6)).astype(np.uint8)
    weight[:, 2], weight[:, 4], weight[:, 3] = 7, 9, 0
    scale = np.linspace(0.01, 0.02, 6).astype(np.float32)
    case = small(
        ("DequantizeLinear", [weight, scale, zeros], "w", {"axis": 1}),
        ("MatMul", ["x", "w"], "m", {}),
        ("Tanh", ["m"], "t", {}),
        ("MatMul", ["t", grid(1, 6, 3).astype(np.float32) / 50], "y", {}),
        x=(2, 4),
    )
    assert failure(case) is None
    result = shrunk(case.model)
    assert shapes(result) == {"w0": (4, 4), "w1": (4,), "w2": (4,), "w3": (4, 3)}
    assert held(result, "w2").tolist() == [3, 0, 1, 0]


@pytest.mark.parametrize(
    "dtype",
    [ml_dtypes.int4, ml_dtypes.uint4, np.int16, ml_dtypes.float8_e4m3fn],
    ids=lambda item: np.dtype(item).name,
)
def test_weights_of_other_widths(dtype):
    """4 bits, 16 bits and float8 are cut as 8 bits are."""
    zero = 8 if dtype is ml_dtypes.uint4 else 0
    weight = grid(0, 8, 6, zero=zero, dead=(1, 4), axis=1, largest=7).astype(dtype)
    point = [np.array(zero, dtype)] if dtype is not np.int16 else []
    case = small(
        ("DequantizeLinear", [weight, np.array(0.05, np.float32), *point], "w", {}),
        ("MatMul", ["x", "w"], "m", {}),
        ("Tanh", ["m"], "t", {}),
        ("MatMul", ["t", grid(1, 6, 3).astype(np.float32) / 50], "y", {}),
        x=(2, 8),
    )
    result = shrunk(case.model)
    assert shapes(result)["w0"] == (8, 4)
    assert held(result, "w0").dtype == np.dtype(dtype)
    assert difference(run(case.model, case.feeds), run(result, case.feeds)) is None


def test_blocks_of_inputs_go_as_a_whole():
    """Of three blocks of four inputs one is dead, and one half dead stays whole."""
    weight = grid(0, 12, 5, dead=(4, 5, 6, 7, 9, 10))
    scale = np.random.default_rng(1).random((3, 5)).astype(np.float32) / 50
    case = small(
        ("MatMul", ["x", np.random.default_rng(2).standard_normal((6, 12)).astype(np.float32)], "m", {}),
        ("Tanh", ["m"], "t", {}),
        ("DequantizeLinear", [weight, scale, np.zeros((3, 5), np.int8)], "w", {"axis": 0, "block_size": 4}),
        ("MatMul", ["t", "w"], "y", {}),
        x=(2, 6),
    )
    assert failure(case) is None
    result = shrunk(case.model)
    assert shapes(result) == {"w0": (6, 8), "w1": (8, 5), "w2": (2, 5), "w3": (2, 5)}


def test_a_cut_that_no_form_holds_is_pinned(tmp_path):
    """Output channels of which blocks share a scale: one of a block cannot go, and the reason is told."""
    weight = grid(0, 6, 8, dead=(1, 2), axis=1)
    scale = np.random.default_rng(1).random((6, 2)).astype(np.float32) / 50
    case = small(
        ("DequantizeLinear", [weight, scale], "w", {"axis": 1, "block_size": 4}),
        ("MatMul", ["x", "w"], "m", {}),
        ("Tanh", ["m"], "t", {}),
        ("MatMul", ["t", grid(1, 8, 3).astype(np.float32) / 50], "y", {}),
        x=(2, 6),
    )
    assert failure(case) is None
    assert shapes(shrunk(case.model))["w0"] == (6, 8)
    onnx.save(case.model, tmp_path / "m.onnx")
    assert "share a scale" in "\n".join(explain(tmp_path / "m.onnx", "m", align="off").lines)


def test_a_transposed_weight_is_cut_where_it_is_stored():
    """DequantizeLinear and Transpose in front of a MatMul."""
    case = small(
        (
            "DequantizeLinear",
            [grid(0, 8, 4, dead=(0, 5)), np.linspace(0.01, 0.02, 8).astype(np.float32), np.zeros(8, np.int8)],
            "d",
            {"axis": 0},
        ),
        ("Transpose", ["d"], "w", {"perm": [1, 0]}),
        ("MatMul", ["x", "w"], "m", {}),
        ("Tanh", ["m"], "t", {}),
        ("MatMul", ["t", grid(1, 8, 3).astype(np.float32) / 50], "y", {}),
        x=(2, 4),
    )
    assert failure(case) is None
    result = shrunk(case.model)
    assert shapes(result) == {"w0": (6, 4), "w1": (6,), "w2": (6,), "w3": (6, 3)}
    assert operators(result) == operators(case.model)


def test_quantised_while_training():
    """A float weight behind QuantizeLinear and DequantizeLinear is stored quantised, and cut."""
    weight = np.random.default_rng(0).standard_normal((6, 3, 1, 1)).astype(np.float32)
    weight[[1, 4]] = 0
    parameters = [np.array(0.02, np.float32), np.array(0, np.int8)]
    case = small(
        ("QuantizeLinear", [weight, *parameters], "q", {}),
        ("DequantizeLinear", ["q", *parameters], "w", {}),
        ("Conv", ["x", "w"], "c", {}),
        (
            "Conv",
            ["c", np.random.default_rng(1).standard_normal((2, 6, 3, 3)).astype(np.float32)],
            "y",
            {"pads": [1] * 4},
        ),
        x=(1, 3, 4, 4),
    )
    assert failure(case, floor=False) is None
    result = shrunk(case.model)
    kernels = [(tuple(item.dims), item.data_type) for item in result.graph.initializer if len(item.dims) == 4]
    assert sorted(kernels) == [((2, 4, 3, 3), 1), ((4, 3, 1, 1), 3)]


def test_quantised_tables_lose_columns():
    """Embeddings: the columns that nothing reads go, with their scales."""
    ids = np.array([[0, 2, 4]])
    case = small(
        (
            "DequantizeLinear",
            [grid(0, 9, 6), np.linspace(0.01, 0.02, 6).astype(np.float32), np.zeros(6, np.int8)],
            "table",
            {"axis": 1},
        ),
        ("Gather", ["table", ids], "e", {"axis": 0}),
        ("Add", ["e", "x"], "s", {}),
        ("MatMul", ["s", grid(1, 6, 3, dead=(0, 3)).astype(np.float32) / 50], "y", {}),
        x=(1, 1, 1),
    )
    assert failure(case) is None
    assert shapes(shrunk(case.model))["w0"] == (9, 4)


# biases


def biased(bias, scale):
    """Return a Conv on quantised data with constants, whose bias has its own scale."""
    step = np.array(0.05, np.float32)
    return small(
        ("Conv", ["x", np.zeros((3, 2, 1, 1), np.float32), np.array([1.0, 0.5, -2.0], np.float32)], "c", {}),
        ("Concat", ["c", "x"], "j", {"axis": 1}),
        ("QuantizeLinear", ["j", step, np.array(100, np.uint8)], "q", {}),
        ("DequantizeLinear", ["q", step, np.array(100, np.uint8)], "d", {}),
        (
            "DequantizeLinear",
            [grid(0, 4, 5, 3, 3), np.array(0.01, np.float32), np.array(0, np.int8)],
            "w",
            {},
        ),
        ("DequantizeLinear", [bias, scale], "b", {"axis": 0}),
        ("Conv", ["d", "w", "b"], "y", {}),
        x=(1, 2, 5, 5),
    )


def test_constants_fold_into_a_quantised_bias():
    """Where the bias counts in units of the products, what is folded is a whole number of them."""
    units = np.full(4, np.float32(0.05) * np.float32(0.01), np.float32)
    case = biased(np.array([10, -20, 30, 40], np.int32), units)
    result = shrunk(case.model)
    weight = held(case.model, next(node for node in case.model.graph.node if node.output[0] == "w").input[0])
    # the third constant stays, since a tensor keeps at least one channel
    share = weight[:, :2].astype(np.int64).sum(axis=(2, 3)) @ np.array([20, 10])
    biases = [
        numpy_helper.to_array(item)
        for item in result.graph.initializer
        if item.data_type == onnx.TensorProto.INT32
    ]
    assert [item.tolist() for item in biases] == [(np.array([10, -20, 30, 40]) + share).tolist()]
    assert failure(case) is None


def test_constants_that_a_quantised_bias_cannot_hold():
    """With another unit the bias becomes a plain one: the sum is not rounded to what fits."""
    case = biased(np.array([10, -20, 30, 40], np.int32), np.full(4, 0.07, np.float32))
    result = shrunk(case.model)
    assert not [item for item in result.graph.initializer if item.data_type == onnx.TensorProto.INT32]
    assert failure(case) is None


def test_what_a_form_holds():
    """Adding to integers: whole units within the slack, within the type's range, and nothing else."""
    step = Step("DequantizeLinear", "", (), None)
    form = Stored((np.array([100, -5], np.int8), np.array(0.5, np.float32), None), ("q", "s", ""), (step,))
    none = np.zeros(2)
    assert form.plus(np.array([1.0, -2.0]), none).entries.tolist() == [102, -9]
    assert form.plus(np.array([1.2, 0.0]), none) is None
    assert form.plus(np.array([1.2, 0.0]), none + 0.3).entries.tolist() == [102, -5]
    assert form.plus(np.array([20.0, 0.0]), none) is None


# operators on integers


def test_what_sets_the_range_stays():
    """DynamicQuantizeLinear: of four dead channels the two that are zero go; what nothing reads stays."""
    weight = grid(1, 6, 4, dead=(5,))
    bias = np.array([0.0, 0.5, -3.0, 0.0, 1.0, 2.0], np.float32)
    first = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    first[:, :4] = 0
    net = Net(x=(2, 3))
    net.node("MatMul", ["x", first], "m")
    net.node("Add", ["m", bias], "a")
    net.node("DynamicQuantizeLinear", ["a"], ["q", "s", "z"])
    net.node("MatMulInteger", ["q", weight, "z"], "i")
    net.node("Cast", ["i"], "f", to=1)
    net.node("Mul", ["f", "s"], "y")
    case = net.case("y")
    assert failure(case) is None
    assert shapes(shrunk(case.model)) == {"w0": (3, 4), "w1": (4,), "w2": (4, 4)}


@pytest.mark.parametrize("other", [False, True])
def test_a_zero_point_is_that_of_its_own_tensor(other):
    """What is the zero point of one tensor is no zero where another's zero point is taken off."""
    first = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    first[:, :2] = 0
    net = Net(x=(2, 3))
    net.node("MatMul", ["x", first], "m")
    net.node("DynamicQuantizeLinear", ["m"], ["q", "s", "z"])
    net.node("Exp", ["x"], "e")
    net.node("DynamicQuantizeLinear", ["e"], ["q2", "s2", "z2"])
    zero = "z2" if other else "z"
    net.node("MatMulInteger", ["q", grid(1, 6, 4), zero], "i")
    net.node("DequantizeLinear", ["q", "s", zero], "d")
    net.node("Cast", ["i"], "f", to=1)
    net.node("MatMul", ["d", grid(2, 6, 4).astype(np.float32)], "g")
    net.node("Add", ["f", "g"], "y")
    case = net.case("y")
    assert failure(case) is None
    assert shapes(shrunk(case.model))["w0"] == ((3, 6) if other else (3, 4))


def packed(size, width, bits, *, dead=(), unread=(), given=True):
    """Return the inputs of a MatMulNBits with blocks of 16, and its attributes."""
    random = np.random.default_rng(size)
    blocks = -(-size // 16)
    points = (
        random.integers(0, 1 << bits, (width, blocks)) if given else np.full((width, blocks), 1 << (bits - 1))
    )
    entries = random.integers(0, 1 << bits, (width, blocks, 16))
    entries[list(dead)] = points[list(dead)][..., None]
    flat = entries.reshape(width, -1)
    flat[:, list(unread)] = np.repeat(points, 16, axis=1)[:, list(unread)]
    inputs = [
        packed_rows(flat, bits).reshape(width, blocks, -1),
        (random.random((width, blocks)) / 20 + 0.01).astype(np.float32),
    ]
    attributes = {"K": size, "N": width, "bits": bits, "block_size": 16, "domain": MICROSOFT}
    return [*inputs, *([packed_rows(points, bits)] if given else [])], attributes


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_lose_rows_and_whole_blocks(bits, given):
    """The third block of inputs is dead and goes; channels 3 and 50 are dead in blocks that live."""
    first, attributes = packed(24, 64, bits, dead=[*range(32, 48), 3, 50], given=given)
    second, more = packed(64, 6, bits, unread=range(16, 20), given=given)
    case = small(
        ("MatMulNBits", ["x", *first], "m", attributes),
        ("Tanh", ["m"], "t", {}),
        ("MatMulNBits", ["t", *second], "y", more),
        x=(3, 24),
    )
    assert failure(case) is None
    result = shrunk(case.model)
    found = [
        [tuple(held(result, name).shape) for name in node.input[1:]]
        for node in result.graph.node
        if node.op_type == "MatMulNBits"
    ]
    width = bits * 2
    points = [[(48, bits // 4)] if given else [], [(6, {4: 2, 8: 3}[bits])] if given else []]
    assert found == [[(48, 2, width), (48, 2), *points[0]], [(6, 3, width), (6, 3), *points[1]]]


def test_packing_is_undone_by_unpacking():
    """Rows of odd length are padded; the entries come back."""
    for bits in (2, 4, 8):
        entries = np.random.default_rng(bits).integers(0, 1 << bits, (3, 7))
        assert np.array_equal(unpacked(packed_rows(entries, bits), bits)[:, :7], entries)


def test_scales_that_stay_behind_are_told_apart(tmp_path, monkeypatch):
    """Negative control: without cutting what belongs to the channels the result is wrong or does not run."""
    case = quantised(convolutional(0), tmp_path, quant_format=QuantFormat.QOperator, per_channel=True)
    assert failure(case) is None
    cut = IntegerContraction.edits

    def edits(self, state):
        along, self.along = self.along, ()
        yield from cut(self, state)
        self.along = along

    monkeypatch.setattr(IntegerContraction, "edits", edits)
    assert failure(case) is not None


def test_a_threshold_leaves_quantised_weights_alone(tmp_path):
    """`--zero-below` is for float weights: on a grid what is nearly zero is zero already."""
    case = quantised(mlp("Gemm"), tmp_path, quant_format=QuantFormat.QDQ)
    model = ir.from_proto(case.model)
    assert newly_dead(model, 0.5) == 0
    assert ir.to_proto(with_zeros(model, 0.5)).graph.initializer == ir.to_proto(model).graph.initializer
