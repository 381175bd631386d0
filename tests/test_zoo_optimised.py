"""Networks that ONNX Runtime has optimised before shrink to the natively reduced size, and keep their fused nodes."""

from __future__ import annotations

import collections

import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from test_zoo import Case, assert_equal, build, write  # noqa: E402  # after the check for torch
from zoo.export import weight_elements  # noqa: E402
from zoo.networks import ZOO  # noqa: E402
from zoo.planting import Planting  # noqa: E402

from etp_deploy.pipeline import compress  # noqa: E402

# some of what the runtime fuses in these; how many it chooses by the machine
FUSED = {
    "vgg": {"FusedConv", "FusedGemm"},
    "resnet": {"FusedConv"},
    "mobilenetv2": {"FusedConv"},
    "vit": {"FusedMatMul", "SkipLayerNormalization"},
}


def optimise(path, level, target):
    """Write what the runtime's optimiser makes of a model at a level."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return target


def fused(path):
    """Return how often a model has each of the runtime's own operators."""
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node if node.domain)


@pytest.mark.parametrize("network", FUSED)
def test_optimised_networks_shrink_to_the_native_size(network, tmp_path):
    """At both levels that write portable operators the count is that of the native network, optimised as far."""
    case = Case(network, "torchscript", "static", Planting("scattered", "weights"))
    net, planted = build(case)
    plain = write(net, case, tmp_path / "planted.onnx")
    native = write(ZOO[network].build(planted.widths), case, tmp_path / "native.onnx")
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED):
        before = optimise(plain, level, tmp_path / "before.onnx")
        wanted = weight_elements(optimise(native, level, tmp_path / "wanted.onnx"))
        after = tmp_path / "after.onnx"
        compress(before, after, align="off", simplify=False, verify=False)
        assert_equal(case, before, after)
        assert weight_elements(after) == wanted < weight_elements(before)
        assert fused(after) == fused(before)
    assert FUSED[network] & set(fused(before))


def test_fused_nodes_that_are_not_taken_apart_stay(tmp_path, monkeypatch):
    """Control: read as they are, fused convolutions have no rule, and little is removed."""
    case = Case("vgg", "torchscript", "static", Planting("scattered", "weights"))
    plain = write(build(case)[0], case, tmp_path / "planted.onnx")
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    before, after = optimise(plain, level, tmp_path / "before.onnx"), tmp_path / "after.onnx"
    monkeypatch.setattr("etp_deploy.surgery.prepare.take_apart", lambda *graph: False)  # noqa: ARG005
    compress(before, after, align="off", simplify=False, verify=False)
    assert weight_elements(after) > 0.9 * weight_elements(before)
