"""Branches of residuals shrink on request, exactly, and by default where that pays only."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import run, weight_elements
from test_cli import PLAIN, call
from test_surgery_regressions import Net

from etp_deploy import compress
from etp_deploy.errors import UsageError
from etp_deploy.inspection import explain, inspect
from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.policy import multiple_fill
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.residuals import partial_residuals, shrink_branches
from etp_deploy.surgery.rewrite import restore_interface, rewrite

INNER, STREAM, OUT = 6, 12, 3


def residual(dead, *, constant=0.0, width=STREAM, size=5, kernel=1, opset=18):
    """Return a stream with a branch of which some channels are constant, read by a convolution."""
    net = Net(x=("batch", INNER, size, size))
    net.node("Conv", ["x", net.rand(width, INNER, 1, 1)], "stream")
    net.node("Conv", ["x", net.rand(INNER, INNER, kernel, kernel)], "inner", pads=[kernel // 2] * 4)
    net.node("Relu", ["inner"], "active")
    bias = net.rand(width)
    bias[list(dead)] = constant
    net.node("Conv", ["active", net.rand(width, INNER, 1, 1, dead=dead), bias], "branch")
    net.node("Add", ["stream", "branch"], "sum")
    net.node("Relu", ["sum"], "bent")
    net.node("Conv", ["bent", net.rand(OUT, width, 1, 1)], "y")
    return net.case("y", opset=opset)


def elements(kept, width=STREAM, lost=0, kernel=1):
    """Return that network's elements, with so many channels of the branch and constants to add."""
    return width * INNER + INNER * INNER * kernel**2 + kept * (INNER + 1) + OUT * width + lost


def gained(case, wanted="always", multiple=1):
    """Return weight elements before and after; outputs are equal, optimised and not."""
    original = ir.from_proto(case.model)
    prepared, fill = prepare(original), multiple_fill(multiple)
    removal, _ = plan(prepared.graph, fill)
    rewrite(prepared, removal.edits)
    more = shrink_branches(prepared, removal.layers, partial_residuals(wanted, multiple), fill)
    if more is not None:
        prepared, removal, _ = more
        rewrite(prepared, removal.edits)
    restore_interface(prepared, original)
    result = ir.to_proto(prepared)
    for optimised in (False, True):
        for one, other in zip(
            run(case.model, case.feeds), run(result, case.feeds, optimised=optimised), strict=True
        ):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())
    return weight_elements(case.model), weight_elements(result), result


RUNS = {
    "tail": (range(7, 12), 7),
    "head": (range(5), 7),
    "both ends": ((0, 1, 10, 11), 8),
    "holes": ((1, 4, 9, 10, 11), 9),
}


@pytest.mark.parametrize("opset", [9, 18])
@pytest.mark.parametrize("run_of", RUNS)
def test_a_branch_keeps_the_run_of_its_living_channels(run_of, opset):
    """What makes the branch is as small as its run, one Pad places it, and no Gather is left."""
    dead, kept = RUNS[run_of]
    before, after, model = gained(residual(dead, opset=opset))
    assert (before, after) == (elements(STREAM), elements(kept))
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Pad"), kinds.count("Gather")) == (1, 0)


def test_constants_that_are_not_zero_are_added():
    """A dead channel's bias is added behind the Pad; without `always` it keeps its channel."""
    case = residual(range(7, 12), constant=0.5)
    before, after, _ = gained(case)
    assert (before, after) == (elements(STREAM), elements(7, lost=STREAM))
    before, after, _ = gained(case, "auto")
    assert before == after


def test_counts_are_aligned():
    """A run is as long as the kernels want it, where there are enough channels."""
    before, after, _ = gained(residual(range(5, 12)), multiple=4)
    assert (before, after) == (elements(STREAM), elements(8))


def test_transformers_have_residuals_too():
    """The axis of channels may be the last one."""
    net = Net(x=(2, "tokens", 6))
    net.node("MatMul", ["x", net.rand(6, 10)], "stream")
    net.node("MatMul", ["x", net.rand(6, 8)], "up")
    net.node("Relu", ["up"], "active")
    net.node("MatMul", ["active", net.rand(8, 10, dead=(8, 9), axis=1)], "down")
    net.node("Add", ["down", "stream"], "sum")
    net.node("LayerNormalization", ["sum", net.rand(10)], "norm")
    net.node("MatMul", ["norm", net.rand(10, 3)], "y")
    before, after, _ = gained(net.case("y"))
    assert after == before - 2 * 8


PAYING = {
    "many channels, small maps, few alive": (1024, 14, 500, True),
    "few channels": (1023, 14, 500, False),
    "large maps": (1024, 15, 500, False),
    "too many alive": (1024, 14, 513, False),
}


@pytest.mark.parametrize("case_of", PAYING)
def test_branches_shrink_where_that_pays(case_of):
    """Where the copy costs more than it saves the branch stays as it is."""
    width, size, alive, pays = PAYING[case_of]
    case = residual(range(alive, width), width=width, size=size)
    before, after, _ = gained(case, "auto")
    assert (before, after) == (elements(width, width), elements(alive if pays else width, width))


@pytest.mark.parametrize("reader", ["output", "another"])
def test_a_branch_that_is_read_elsewhere_stays(reader):
    """Negative control: what reads the branch itself needs all of it."""
    case = residual(range(7, 12), constant=0.5)
    if reader == "output":
        case.model.graph.output.append(onnx.ValueInfoProto(name="branch"))
        case.model.graph.output[-1].type.tensor_type.elem_type = 1
    else:
        case.model.graph.node.append(onnx.helper.make_node("Softmax", ["branch"], ["z"], axis=1))
        case.model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    before, after, _ = gained(case)
    assert before == after


def test_a_branch_that_cannot_shrink_is_not_padded():
    """Groups keep equal counts: of a convolution with all but one group dead nothing goes, so no Pad is written."""
    net = Net(x=(1, 6, 5, 5))
    net.node("Conv", ["x", net.rand(12, 6, 1, 1)], "stream")
    net.node("Conv", ["x", net.rand(12, 3, 3, 3, dead=(10, 11))], "branch", group=2, pads=[1] * 4)
    net.node("Add", ["stream", "branch"], "sum")
    net.node("Relu", ["sum"], "bent")
    net.node("Conv", ["bent", net.rand(3, 12, 1, 1)], "y")
    before, after, model = gained(net.case("y"))
    assert before == after
    assert "Pad" not in {node.op_type for node in model.graph.node}


def test_a_bias_is_no_stream():
    """A constant added to a tensor that is partly zero is left where the tensor's producer has it."""
    net = Net(x=(1, 6, 5))
    net.node("MatMul", ["x", net.rand(5, 12, dead=range(6, 12), axis=1)], "h")
    net.node("Add", ["h", net.rand(12)], "biased")
    net.node("LayerNormalization", ["biased", net.rand(12)], "norm")
    net.node("MatMul", ["norm", net.rand(12, 3)], "y")
    before, after, model = gained(net.case("y"))
    assert before == after
    assert "Pad" not in {node.op_type for node in model.graph.node}


def test_pads_that_add_anything_else_are_noticed(monkeypatch):
    """Negative control: a run that is one channel off gives other results."""
    monkeypatch.setattr("etp_deploy.surgery.residuals._run", lambda *_: (1, 8))
    with pytest.raises(AssertionError):
        gained(residual(range(7, 12)))


def test_compress_and_inspect_agree(tmp_path):
    """Rows of both removals come together: what the plan shows is what goes."""
    path = tmp_path / "model.onnx"
    onnx.save(residual(range(7, 12)).model, path)
    assert compress(path, tmp_path / "a.onnx", align="off").removed["channels"] == 0
    report = compress(path, tmp_path / "b.onnx", align="off", partial_residuals="always")
    assert report.after.parameters == elements(7)
    assert report.verification.passed
    assert report.removed["channels"] == 5
    shown = inspect(path, align="off", partial_residuals="always")
    assert shown.layers == report.layers
    row = next(row for row in shown.layers if row.name == "branch")
    assert (row.constant, row.kept, row.kept_dead, row.reasons) == (5, 7, 0, ())
    assert explain(path, "branch", align="off", partial_residuals="always").kept == 7
    with pytest.raises(UsageError, match="no way to treat residuals"):
        inspect(path, partial_residuals="sometimes")


def twins(path):
    """Write a stream with a branch of which half adds nothing, and of two channels inside one is twice the other."""
    net = Net(x=(1, 3, 6, 6))
    first = net.rand(6, 3, 3, 3)
    first[4] = 2 * first[1]
    net.node("Conv", ["x", net.rand(8, 3, 3, 3)], "stream")
    net.node("Conv", ["x", first], "inner")
    net.node("Relu", ["inner"], "bent")
    net.node("Conv", ["bent", net.rand(8, 6, 1, 1, dead=range(4, 8))], "branch")
    net.node("Add", ["stream", "branch"], "sum")
    net.node("Relu", ["sum"], "out")
    net.node("Conv", ["out", net.rand(2, 8, 1, 1)], "y")
    onnx.save(net.case("y").model, path)
    return path


@pytest.mark.parametrize(
    ("options", "left"),
    [((), (6, 8)), (("--merge-duplicates",), (5, 8)), (("--partial-residuals", "always"), (6, 4))],
)
def test_removal_beyond_what_is_dead(options, left, capfd, tmp_path):
    """Duplicates and partial residuals go on request, and inspect shows what compress does."""
    source, out = twins(tmp_path / "twins.onnx"), tmp_path / "o.onnx"
    arguments = ("compress", source, "-o", out, *PLAIN, "--align", "off", "--json", *options)
    _, printed, told = call(capfd, *arguments)
    document = json.loads(printed)
    assert document["parameters"]["after"] == 8 * 27 + left[0] * 27 + left[0] * left[1] + 16
    assert document["merged_duplicates"] == 6 - left[0]
    assert ("merged as multiples of others: 1" in told) == (left[0] == 5)
    shown = json.loads(call(capfd, "inspect", source, "--align", "off", "--json", *options)[1])
    assert {row["name"]: row["kept"] for row in shown["layers"]}["branch"] == left[1]
    assert [row["kept"] for row in shown["layers"]] == [row["kept"] for row in document["layers"]]
    assert shown["merged_duplicates"] == 6 - left[0]
    lines = call(capfd, "inspect", source, "--align", "off", "--explain", "branch", *options)[1]
    assert f"{left[1]} of {left[1]} stay" in lines or f"{left[1]} of 8 stay" in lines
