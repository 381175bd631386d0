"""Alignment for a target: candidates that are measured on this machine, rules for the others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from etp_deploy import pipeline, tuning
from etp_deploy.errors import ModelError, UsageError
from etp_deploy.inspection import inspect
from etp_deploy.modelfile import read_model
from etp_deploy.pipeline import compress
from etp_deploy.surgery.policy import TARGETS
from etp_deploy.tuning import fastest, host_target, measured

CHANNELS, DEAD = 24, 9


@pytest.fixture
def stack(tmp_path):
    """Three convolutions, nine of whose twenty-four channels are zero each."""
    random = np.random.default_rng(0)
    nodes, weights, x, width = [], [], "x", 3
    for place in range(3):
        weight = random.standard_normal((CHANNELS, width, 3, 3)).astype(np.float32)
        weight[:DEAD] = 0
        weights.append(numpy_helper.from_array(weight, f"w{place}"))
        nodes += [
            helper.make_node("Conv", [x, f"w{place}"], [f"c{place}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{place}"], [f"r{place}"]),
        ]
        x, width = f"r{place}", CHANNELS
    last = random.standard_normal((4, CHANNELS, 1, 1)).astype(np.float32)
    weights.append(numpy_helper.from_array(last, "last"))
    nodes.append(helper.make_node("Conv", [x, "last"], ["y"]))
    info = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, width, 6, 6])
        for name, width in (("x", 3), ("y", 4))
    ]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], weights)
    path = tmp_path / "stack.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def widths(path) -> list[int]:
    """The output channels of each convolution."""
    return [node.inputs[1].const_value.shape[0] for node in read_model(path).graph if node.op_type == "Conv"]


# 15 channels live: which of 15, 16 and 24 is kept
@pytest.mark.parametrize(
    ("times", "used", "kept"),
    [
        ({"off": 1.0, "16": 0.5}, "4", 16),
        ({"off": 1.0, "16": 0.995}, "off", 15),
        ({"off": 1.0, "16": 1.4}, "off", 15),
    ],
)
def test_the_fastest_candidate_is_kept(stack, monkeypatch, times, used, kept):
    """A larger candidate is taken only where it is clearly faster; 4, 8 and 16 are one candidate here."""
    seen = []

    def take(paths, inputs):
        assert inputs is None
        seen.extend(widths(path)[0] for path in paths)
        return list(times.values())

    monkeypatch.setattr(pipeline, "measured", take)
    monkeypatch.setattr(tuning, "host_target", lambda: TARGETS["cpu-avx512"])
    report = compress(stack, stack.with_name("small.onnx"), simplify=False)
    assert seen == [15, 16]
    assert widths(stack.with_name("small.onnx")) == [kept] * 3 + [4]
    assert report.alignment.used == used
    assert list(report.alignment.times) == ["off", "4"]


def test_what_cannot_be_measured_follows_the_rule(stack, monkeypatch):
    """Where no candidate runs on drawn inputs the target's rule decides."""

    def refuse(paths, _inputs):
        raise ModelError("does not run", where=str(paths[0]))

    monkeypatch.setattr(pipeline, "measured", refuse)
    report = compress(stack, stack.with_name("small.onnx"), verify=False, simplify=False)
    assert widths(stack.with_name("small.onnx")) == [16] * 3 + [4]
    assert report.alignment.times is None


@pytest.mark.parametrize(
    ("target", "kept"), [("none", 15), ("cpu-avx2", 16), ("cpu-avx512", 16), ("arm64", 16), ("cuda", 16)]
)
def test_other_targets_are_planned_by_rule(stack, monkeypatch, target, kept):
    """Nothing is measured for a machine that is not this one."""
    monkeypatch.setattr(pipeline, "measured", None)
    report = compress(stack, stack.with_name("small.onnx"), target=target, verify=False, simplify=False)
    assert widths(stack.with_name("small.onnx")) == [kept] * 3 + [4]
    assert report.alignment.target == target


def test_a_target_that_is_none_is_refused(stack):
    """The names are told."""
    with pytest.raises(UsageError, match="no such target"):
        compress(stack, stack.with_name("small.onnx"), target="cpu-avx1024")


def test_a_time_is_that_of_one_run_whatever_the_number_of_runs(stack, monkeypatch):
    """Candidates run as often as fills a block; ratios are of single runs, against the first."""
    cost = {0: 1e-3, 1: 2e-3, 2: 0.25e-3}
    calls = iter(cost)
    monkeypatch.setattr("etp_deploy.bench.sessions.bind_host", lambda session, given: _call(next(calls)))  # noqa: ARG005
    monkeypatch.setattr(tuning, "_seconds", lambda call, runs: cost[call()] * runs)
    assert tuning.take_turns([stack] * 3, None) == pytest.approx([1, 2, 0.25])


def _call(number):
    return lambda: number


def test_candidates_run_in_a_process_of_their_own(stack):
    """One number for each candidate, the first one's 1."""
    first, second = measured([stack, stack], None)
    assert first == 1
    assert second > 0


@pytest.mark.parametrize(
    ("ratios", "place"), [([1.0, 0.995, 0.4], 2), ([1.0, 0.995, 1.4], 0), ([1.0, 0.9, 0.895], 1)]
)
def test_a_smaller_candidate_wins_unless_another_is_clearly_faster(ratios, place):
    """One percent is not clear."""
    assert fastest(ratios) == place


def test_the_host_is_a_known_target(monkeypatch):
    """AVX-512 decides between the two sizes of block, and 64-bit Arm is told by its name."""
    for machine, flags, name in (
        ("x86_64", ["avx2"], "cpu-avx2"),
        ("x86_64", ["avx2", "avx512f"], "cpu-avx512"),
        ("aarch64", [], "arm64"),
    ):
        monkeypatch.setattr(tuning.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(tuning, "cpu_flags", lambda flags=flags: flags)
        assert host_target().name == name


def test_inspect_tells_what_options_would_change(stack):
    """Channels that would go by alignment, and output channels that a threshold would make dead."""
    model = onnx.load(stack)
    weight = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weight[DEAD : DEAD + 2] *= 1e-5
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "w1"))
    onnx.save(model, stack)
    found = inspect(stack, target="cpu-avx512")
    assert found.by_align == {"off": 27, "4": 24, "8": 24, "16": 24}
    assert found.nearly_dead == {"1e-06": 0, "0.0001": 2, "0.01": 2}
