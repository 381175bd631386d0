"""Verification passes what is equal, fails what is not, and fails closed where it cannot know."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from etp_deploy.comparing import difference
from etp_deploy.errors import ModelError, ProviderError, UsageError
from etp_deploy.inputs import InputSpec
from etp_deploy.trials import given_trials
from etp_deploy.verification import verify

OPSET = [helper.make_opsetid("", 17)]


def save(path, nodes, inputs, outputs, weights=()):
    """Save a model given by nodes, declared values as {name: (type, shape)} and arrays as {name: array}."""
    declare = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [declare(name, *value) for name, value in inputs.items()],
        [declare(name, *value) for name, value in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in dict(weights).items()],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=OPSET), path)
    return path


def conv(path, change=0.0, dtype=np.float32):
    """Save a small dynamic convolution; `change` is added to one weight."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(8, 3, 3, 3)), "b": rng.normal(size=8)}
    weights["w"][2, 1, 0, 2] += change
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["y"]),
    ]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return save(
        path,
        nodes,
        {"x": (element, ["batch", 3, "height", "width"])},
        {"y": (element, ["batch", 8, 1, 1])},
        {name: array.astype(dtype) for name, array in weights.items()},
    )


def unary(path, operator, shape=("n",), element=TensorProto.FLOAT, **attributes):
    """Save a model of one node from x to y."""
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    return save(path, [node], {"x": (element, shape)}, {"y": (element, shape)})


def test_a_model_equals_itself_over_seeds_and_sizes(tmp_path):
    """Equal models pass, with several seeds, batches and spatial sizes on record."""
    model = conv(tmp_path / "a.onnx")
    answer = verify(model, model, samples=2, seed=5)
    assert answer.passed
    assert answer.reason == ""
    assert answer.max_abs_error == 0
    assert len(answer.shapes) == 4
    assert {shape["x"][0] for shape in answer.shapes} == {1, 2, 3}
    assert answer.seeds == (5, 6, 7, 8, 9)
    assert answer.samples == 5


def test_one_changed_weight_fails(tmp_path):
    """The negative control: 1e-3 on one of 216 weights is found."""
    answer = verify(conv(tmp_path / "a.onnx"), conv(tmp_path / "b.onnx", change=1e-3))
    assert not answer.passed
    assert "output 'y' differs by" in answer.reason
    assert answer.max_rel_error > 1e-5


def test_the_answer_is_json(tmp_path):
    """The answer can be written as strict JSON, failed or not."""
    model = conv(tmp_path / "a.onnx")
    passed = json.loads(json.dumps(verify(model, model, samples=1).to_json(), allow_nan=False))
    assert passed["passed"] is True
    assert passed["shapes"][0] == {"x": [1, 3, 64, 64]}
    other = unary(tmp_path / "b.onnx", "Relu")
    failed = json.loads(json.dumps(verify(model, other).to_json(), allow_nan=False))
    assert failed["passed"] is False
    assert failed["max_abs_error"] is None


def test_half_precision_has_its_own_tolerance(tmp_path):
    """A model in float16 is held to float16's rounding, and a change above that is still found."""
    model = conv(tmp_path / "a.onnx", dtype=np.float16)
    assert verify(model, model).rtol == pytest.approx(4 * 2**-10)
    assert not verify(model, conv(tmp_path / "b.onnx", change=2, dtype=np.float16)).passed


def test_interfaces_must_be_the_same(tmp_path):
    """Other names, types, ranks and sizes of inputs and outputs are reasons."""
    base = unary(tmp_path / "a.onnx", "Relu")
    renamed = save(
        tmp_path / "b.onnx",
        [helper.make_node("Relu", ["z"], ["y"])],
        {"z": (TensorProto.FLOAT, ["n"])},
        {"y": (TensorProto.FLOAT, ["n"])},
    )
    assert "inputs are ['z'] instead of ['x']" in verify(base, renamed).reason
    retyped = unary(tmp_path / "c.onnx", "Relu", element=TensorProto.DOUBLE)
    assert "instead of" in verify(base, retyped).reason
    ranked = unary(tmp_path / "d.onnx", "Relu", shape=("n", 2))
    assert "is declared" in verify(base, ranked).reason
    static = unary(tmp_path / "e.onnx", "Relu", shape=(4,))
    assert "is declared [4] instead of [None]" in verify(base, static).reason


def test_integers_must_be_equal(tmp_path):
    """One class more or less is a failure, however small the logits' difference."""
    nodes = [helper.make_node("Add", ["x", "b"], ["l"]), helper.make_node("ArgMax", ["l"], ["y"], axis=1)]
    paths = [
        save(
            tmp_path / f"{i}.onnx",
            nodes,
            {"x": (TensorProto.FLOAT, [64, 4])},
            {"y": (TensorProto.INT64, [64, 1])},
            {"b": np.array([0, 0, 0, change], np.float32)},
        )
        for i, change in enumerate((0, 0.5))
    ]
    assert verify(paths[0], paths[0]).passed
    assert "values that must be equal" in verify(*paths).reason


def test_sizes_the_original_refuses_are_skipped_and_named(tmp_path):
    """Beyond a position table the original fails: those sizes are noted, the others decide."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["positions"]),
        helper.make_node("Gather", ["table", "positions"], ["p"]),
        helper.make_node("Add", ["x", "p"], ["y"]),
    ]
    weights = {"one": np.array(1), "zero": np.array(0), "table": np.ones((20,), np.float32)}
    shape = (TensorProto.FLOAT, ["batch", "sequence"])
    model = save(tmp_path / "a.onnx", nodes, {"x": shape}, {"y": shape}, weights)
    answer = verify(model, model)
    assert answer.passed
    assert [note for note in answer.notes if "sequence=32" in note]
    assert all(shape["x"][1] <= 20 for shape in answer.shapes)
    everywhere = verify(model, model, dims={"sequence": 21})
    assert not everywhere.passed
    assert everywhere.reason.startswith("the original does not run")


def test_what_cannot_be_compared_does_not_pass(tmp_path):
    """Random, all-NaN and empty outputs, and sequences, prove nothing and are named."""
    random = unary(tmp_path / "a.onnx", "RandomNormalLike")
    assert "not deterministic" in verify(random, random).reason
    weights = {"nan": np.array(np.nan, np.float32)}
    shape = (TensorProto.FLOAT, ["n"])
    nan = save(
        tmp_path / "b.onnx",
        [helper.make_node("Mul", ["x", "nan"], ["y"])],
        {"x": shape},
        {"y": shape},
        weights,
    )
    assert "NaN everywhere" in verify(nan, nan).reason
    empty = unary(tmp_path / "c.onnx", "Relu", shape=(0, 3))
    assert "is empty for every input" in verify(empty, empty).reason


def test_a_crash_or_a_hang_does_not_pass(tmp_path):
    """A model that kills ONNX Runtime, and one that never ends, fail with a reason."""
    good = unary(tmp_path / "a.onnx", "Identity", shape=(1,), element=TensorProto.INT64)
    shape = (TensorProto.INT64, [1])
    weights = {"low": np.array([np.iinfo(np.int64).min]), "minus": np.array([-1])}
    nodes = [helper.make_node("Div", ["low", "minus"], ["d"]), helper.make_node("Add", ["x", "d"], ["y"])]
    crash = save(tmp_path / "b.onnx", nodes, {"x": shape}, {"y": shape}, weights)
    assert not verify(good, crash).passed
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.INT64, [1]),
        ],
    )
    weights = {"always": np.array(True)}
    nodes = [helper.make_node("Loop", ["", "always", "x"], ["y"], body=body)]
    endless = save(tmp_path / "c.onnx", nodes, {"x": shape}, {"y": shape}, weights)
    assert "did not finish" in verify(good, endless, timeout_s=4).reason


def test_a_result_onnx_runtime_refuses_does_not_pass(tmp_path):
    """Broken inside, though it parses: the reason is what ONNX Runtime said."""
    good = unary(tmp_path / "a.onnx", "Relu")
    bad = unary(tmp_path / "b.onnx", "NoSuchOperator")
    answer = verify(good, bad)
    assert answer.reason.startswith("the result does not run")
    assert "\n" not in answer.reason


def test_wrong_options_and_files_are_errors(tmp_path):
    """What cannot be meant or read raises, with the kind that gives its exit code."""
    model = unary(tmp_path / "a.onnx", "Relu")
    with pytest.raises(UsageError):
        verify(model, model, samples=0)
    with pytest.raises(UsageError):
        verify(model, model, rtol=-1.0)
    with pytest.raises(UsageError):
        verify(model, model, dims={"nothing": 3})
    with pytest.raises(ModelError):
        verify(model, tmp_path / "missing.onnx")
    with pytest.raises(ProviderError):
        verify(model, model, provider="no-such-provider")


def test_the_scale_is_the_tensors_largest_magnitude():
    """An error small against the largest value passes, though large against the value itself."""
    reference = np.array([1e-6, 100.0], np.float32)
    assert difference(reference, reference + np.array([5e-4, 0], np.float32)).reason == ""
    assert difference(reference, reference + np.array([5e-3, 0], np.float32)).reason


def test_small_outputs_are_not_waved_through():
    """Outputs of a tiny scale are held to that scale, not to an absolute tolerance."""
    reference = np.linspace(1e-6, 2e-6, 10)
    assert difference(reference, reference * 1.001).reason


def test_fill_values_do_not_hide_errors():
    """Masks of -1e9 do not loosen what is asked of the other values."""
    reference = np.array([-1e9, -1e9, -1e9, 1.0, 2.0, 0.0])
    other = reference.copy()
    other[3] += 1e-3
    assert difference(reference, other).reason
    assert difference(reference, np.where(reference < -1, -1e9 - 1.0, reference)).reason == ""


def test_nan_and_infinities_must_be_in_their_places():
    """NaN meets NaN and an infinity its own sign; anything else is a difference."""
    reference = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert difference(reference, reference.copy()).reason == ""
    for i, value in ((0, 1.0), (1, -np.inf), (2, np.nan), (3, np.nan)):
        other = reference.copy()
        other[i] = value
        assert "NaN or infinity" in difference(reference, other).reason


def test_types_and_shapes_must_match():
    """Another type or shape is a difference even where values agree."""
    reference = np.ones((2, 3), np.float32)
    assert "type" in difference(reference, reference.astype(np.float64)).reason
    assert "shape" in difference(reference, reference.T).reason
    assert "no tensor" in difference(reference, None).reason
    narrow = np.ones(3, ml_dtypes.bfloat16)
    assert difference(narrow, narrow * 2).max_rel == 1.0


def lookup(path, wrong=0.0):
    """Save a table of 5 rows at indices less 100, which drawn indices miss; `wrong` is added to its last row."""
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    table[4] += wrong
    nodes = [
        helper.make_node("Sub", ["rows", "base"], ["near"]),
        helper.make_node("Gather", ["table", "near"], ["found"]),
        helper.make_node("Add", ["found", "x"], ["y"]),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["batch", 3]), "rows": (TensorProto.INT64, ["batch"])}
    weights = {"table": table, "base": np.array(100)}
    return save(path, nodes, inputs, {"y": (TensorProto.FLOAT, ["batch", 3])}, weights)


def test_given_inputs_are_what_both_run_on(tmp_path):
    """Where drawn inputs do not run, given ones do: together, and each sample of the batch alone."""
    model = lookup(tmp_path / "a.onnx")
    refused = verify(model, model)
    assert not refused.passed
    assert refused.reason.startswith("the original does not run")
    given = {"x": np.ones((2, 3)), "rows": [100, 101]}
    answer = verify(model, model, inputs=given)
    assert answer.passed
    assert answer.seeds == ()
    assert answer.samples == 3
    assert answer.shapes == ({"x": (2, 3), "rows": (2,)}, {"x": (1, 3), "rows": (1,)})
    assert verify(model, model, inputs=given, samples=1).samples == 2
    alone = verify(model, model, inputs={"x": np.ones((1, 3)), "rows": [100]})
    assert alone.shapes == ({"x": (1, 3), "rows": (1,)}, {"x": (2, 3), "rows": (2,)})


def test_a_difference_shows_on_given_inputs_only_where_they_reach_it(tmp_path):
    """The negative control: a wrong row is found by inputs that read it, and by no others."""
    model, other = lookup(tmp_path / "a.onnx"), lookup(tmp_path / "b.onnx", wrong=1e-2)
    given = {"x": np.ones((2, 3)), "rows": [100, 101]}
    assert verify(model, other, inputs=given).passed
    answer = verify(model, other, inputs={**given, "rows": [100, 104]})
    assert not answer.passed
    assert answer.max_abs_error == pytest.approx(1e-2, rel=1e-3)


def test_sizes_that_hang_on_another_are_not_varied():
    """A batch is varied along whichever axis it lies, unless there are two, or a size computed from it."""
    kinds = {"low": 0.0, "high": 1.0, "kind": "float"}

    def trials(**shapes):
        specs = [InputSpec(name, np.dtype(np.float32), shape, **kinds) for name, shape in shapes.items()]
        sizes = {"b": 3, "n": 4, "b*2": 6}
        arrays = {
            name: np.zeros([sizes.get(dim, dim) for dim in shape], np.float32)
            for name, shape in shapes.items()
        }
        return [
            {name: array.shape for name, array in trial.feeds(specs).items()}
            for trial in given_trials(specs, arrays, samples=1)
        ]

    assert trials(x=("b", 5), state=(2, "b", 5)) == [
        {"x": (3, 5), "state": (2, 3, 5)},
        {"x": (1, 5), "state": (2, 1, 5)},
    ]
    assert trials(x=("b", 5), nodes=("n", 5)) == [{"x": (3, 5), "nodes": (4, 5)}]
    assert trials(x=("b", 5), twice=(1, "b*2")) == [{"x": (3, 5), "twice": (1, 6)}]
    assert trials(x=(2, 5)) == [{"x": (2, 5)}]


def test_given_inputs_that_do_not_fit_are_refused(tmp_path):
    """A missing array, a wrong shape, text for numbers, sizes besides: one line each."""
    model = lookup(tmp_path / "a.onnx")
    x, rows = np.ones((2, 3)), [100, 101]
    for given, what in (
        ({"x": x}, "no array was given"),
        ({"x": x[0], "rows": rows}, r"given \(3,\), the model takes"),
        ({"x": x, "rows": ["a", "b"]}, "invalid literal"),
    ):
        with pytest.raises(UsageError, match=what):
            verify(model, model, inputs=given)
    with pytest.raises(UsageError, match="have their sizes"):
        verify(model, model, inputs={"x": x, "rows": rows}, dims={"batch": 4})


def steep(path, halves=False, change=0.0):
    """Save the sine of a hundred times a sum of 64 products, summed up at once or in two halves."""
    weight = np.random.default_rng(0).normal(size=(64, 1)).astype(np.float32)
    weight[5] += np.float32(change)
    ends = {"starts": [0], "middle": [32], "stop": [64], "axis": [1]}
    weights = {"w": weight, "k": np.array([100.0], np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"])]
    if halves:
        weights |= {"low": weight[:32], "high": weight[32:]}
        weights |= {name: np.array(value, np.int64) for name, value in ends.items()}
        del weights["w"]
        nodes = [
            helper.make_node("Slice", ["x", "starts", "middle", "axis"], ["a"]),
            helper.make_node("Slice", ["x", "middle", "stop", "axis"], ["b"]),
            helper.make_node("MatMul", ["a", "low"], ["la"]),
            helper.make_node("MatMul", ["b", "high"], ["hb"]),
            helper.make_node("Add", ["la", "hb"], ["s"]),
        ]
    nodes += [helper.make_node("Mul", ["s", "k"], ["m"]), helper.make_node("Sin", ["m"], ["y"])]
    return save(path, nodes, {"x": (TensorProto.FLOAT, [4, 64])}, {"y": (TensorProto.FLOAT, [4, 1])}, weights)


def test_what_the_last_bits_of_the_inputs_change_is_allowed(tmp_path):
    """Another order of summation is no disagreement where the neighbours of the inputs give as different outputs."""
    found = verify(steep(tmp_path / "a.onnx"), steep(tmp_path / "b.onnx", halves=True))
    assert found.max_rel_error > 1e-5
    assert found.passed, found.reason
    assert any("last bits of the inputs" in note for note in found.notes)
    assert found.max_rel_error <= found.rtol < 1e-2


@pytest.mark.parametrize("change", [2e-4, 1e-2])
def test_more_than_that_is_not(tmp_path, change):
    """One weight that differs by more than its own rounding is found, small as it is."""
    found = verify(steep(tmp_path / "a.onnx"), steep(tmp_path / "b.onnx", change=change))
    assert not found.passed
    assert "differs" in found.reason
