"""The benchmark on tiny real models: its document, its refusals, its memory."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from etp_deploy import sessions
from etp_deploy.bench import benchmark, roofline
from etp_deploy.bench.facts import names
from etp_deploy.bench.isolation import run_child
from etp_deploy.bench.sessions import Setting, bind_host, open_session, run_outputs
from etp_deploy.errors import BenchmarkError, ModelError, ProviderError, UsageError
from etp_deploy.inputs import draw_inputs, input_specs
from etp_deploy.sessions import CPU, DEVICES, provider_class

QUICK = {"sessions": 5, "max_seconds": 1.0, "memory_repeats": 1}


# more than a block of channels (8 or 16): fewer are read as they lie, whatever their number
WIDE, NARROW = 32, 31


def convolutions(path, channels, *, layers=2, batch="batch", scale=1.0):
    """Write a small chain of convolutions that ends in a classifier."""
    rng = np.random.default_rng(0)
    nodes, weights, last, before = [], [], "x", 3
    for layer in range(layers):
        kernel = (scale * rng.standard_normal((channels, before, 3, 3)) / 9).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
        nodes.append(
            helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], name=f"conv{layer}", pads=[1] * 4)
        )
        last, before = f"c{layer}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", 1, [batch, 3, 12, 12])],
        [helper.make_tensor_value_info("y", 1, [batch, channels, 1, 1])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four models: a baseline, the same again, one that computes something else, one of another width."""
    where = tmp_path_factory.mktemp("models")
    convolutions(where / "a.onnx", WIDE)
    convolutions(where / "same.onnx", WIDE)
    convolutions(where / "other.onnx", WIDE, scale=1.1)
    convolutions(where / "narrow.onnx", NARROW)
    return where


@pytest.fixture(scope="module")
def result(folder):
    """One benchmark of a baseline and three contenders."""
    steps = []
    models = [folder / name for name in ("a.onnx", "same.onnx", "other.onnx", "narrow.onnx")]
    found = benchmark(models, progress=lambda step, share: steps.append((step, share)), **QUICK)
    assert [share for _, share in steps] == sorted(share for _, share in steps)
    assert steps[-1] == ("done", 1.0)
    return found


def test_document(result):
    """The document is JSON without NaN, versioned, and holds what the schema promises."""
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["schema"] == "etp-deploy/bench/1"
    assert {"cpu", "cores", "governor", "memory_bytes", "load", "versions", "providers"} <= document[
        "environment"
    ].keys()
    assert [model["name"] for model in document["models"]] == [
        "a.onnx",
        "same.onnx",
        "other.onnx",
        "narrow.onnx",
    ]
    for model in document["models"]:
        (measured,) = model["measurements"]
        assert {"p50", "p90", "p95", "p99", "mean", "min", "samples"} == measured["latency_ms"].keys()
        assert (
            0
            < measured["latency_ms"]["min"]
            <= measured["latency_ms"]["p50"]
            <= measured["latency_ms"]["p99"]
        )
        assert measured["throughput_per_s"] > 0
        assert measured["shapes"] == {"x": [1, 3, 12, 12]}
        assert len(model["sha256"]) == 64
    assert [c["contender"] for c in document["comparisons"]] == ["same.onnx", "other.onnx", "narrow.onnx"]
    for comparison in document["comparisons"]:
        assert comparison["baseline"] == "a.onnx"
        assert comparison["low"] <= comparison["ratio"] <= comparison["high"]
        assert comparison["speedup"] == pytest.approx(1 / comparison["ratio"], rel=1e-4)
        assert comparison["verdict"] in {"faster", "slower", "undecided"}
        assert comparison["clock"] == "cpu"
        assert comparison["control"]["sessions"] == comparison["sessions"] >= 2


def test_no_trace_of_the_machine(result, folder):
    """Neither the models' folder nor a host name is in the document."""
    text = json.dumps(result.to_json())
    assert str(folder) not in text
    assert str(folder.parent) not in text


def test_raw_samples_give_the_percentiles(result):
    """The medians reported are those of the raw samples kept."""
    document = result.to_json()
    for raw in document["samples"]:
        if raw["role"] == "model":
            (measured,) = next(m["measurements"] for m in document["models"] if m["name"] == raw["model"])
            times = [t for session in raw["sessions"] for t in session["wall_ns"]]
            assert len(times) == measured["latency_ms"]["samples"]
            assert np.median(times) / 1e6 == pytest.approx(measured["latency_ms"]["p50"], abs=1e-6)
    assert [raw["role"] for raw in document["samples"]].count("control") == 1


def test_outputs_are_compared(result):
    """Equal outputs agree; a model that computes something else is named in a warning."""
    same, other, narrow = (comparison.outputs for comparison in result.comparisons)
    assert same == {"compared": True, "max_abs_difference": 0.0, "max_rel_difference": 0.0, "agree": True}
    assert other["agree"] is False
    assert narrow["compared"] is False
    assert "shapes" in narrow["reason"]
    found = {warning.name: warning.message for warning in result.warnings}
    assert "other.onnx" in found["outputs_differ"]
    assert all(warning.hint for warning in result.warnings)


def test_layout_explains_odd_channels(result):
    """Where the blocked layout is in use, one that reads an odd number of channels left it."""
    layouts = {measurement.model: measurement.layout for measurement in result.measurements}
    if not layouts["a.onnx"]["blocked"]:
        pytest.skip("this processor's ONNX Runtime has no blocked layout")
    assert layouts["a.onnx"]["left"] == []
    (left,) = layouts["narrow.onnx"]["left"]
    assert left["reason"] == f"{NARROW} input channels, no multiple of 4"


def test_kernel_times_and_macs(result):
    """Per-kernel rows cover every node before and after, with the convolutions' multiply-accumulates."""
    comparison = result.comparisons[0]
    nodes = {m.model: m.nodes for m in result.measurements}
    assert sum(row["baseline_nodes"] for row in comparison.kernels) == len(nodes["a.onnx"])
    assert sum(row["contender_nodes"] for row in comparison.kernels) == len(nodes["same.onnx"])
    assert sum(row["baseline_macs"] for row in comparison.kernels) == 144 * WIDE * 9 * (3 + WIDE)


def test_nodes_are_held_against_the_roof(result):
    """Every node whose work is known is held against what the machine was seen to do at best."""
    for measured in result.measurements:
        assert min(measured.roof.values()) > 0
        shares = [n["roofline_share"] for n in measured.nodes if n["macs"] is not None]
        assert shares
        assert all(share > 0 for share in shares)


def test_memory_phases(result):
    """Weights are exact, and resident memory by phase is ordered as it must be."""
    for measured in result.measurements:
        used = measured.memory
        channels = NARROW if measured.model == "narrow.onnx" else WIDE
        assert used["weights_bytes"] == 4 * 9 * channels * (3 + channels)
        assert used["activation_peak_bytes"] > 0
        order = ("idle", "loaded", "first_run", "steady", "peak")
        sizes = [used["peak_rss_bytes" if phase == "peak" else f"{phase}_rss_bytes"] for phase in order]
        assert sizes[0] < sizes[1]
        # Linux counts a process's pages in batches of 64 for each thread
        assert all(after >= before - 64 * 4096 for before, after in pairwise(sizes))


def test_activation_peak_is_exact(folder):
    """The activation peak is equal from process to process and grows with the batch."""
    specs = input_specs(folder / "a.onnx")
    peaks = [
        run_child("profile", folder / "a.onnx", Setting(), draw_inputs(specs, seed=seed, batch=batch))[
            "activation_peak"
        ]
        for seed, batch in ((0, 4), (1, 4), (0, 1))
    ]
    assert peaks[0] == peaks[1] > peaks[2]


def test_packed_weights_are_no_activations(tmp_path):
    """Weights that ONNX Runtime packs when loading do not count as activations."""
    weight = numpy_helper.from_array(np.ones((512, 512), np.float32), "w")
    value = helper.make_tensor_value_info("x", 1, [1, 512])
    output = helper.make_tensor_value_info("y", 1, [1, 512])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [value], [output], [weight]
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = run_child("profile", path, Setting(), draw_inputs(input_specs(path), seed=0))
    assert found["arena_peak"] >= 512 * 512 * 4
    assert 512 * 4 <= found["activation_peak"] < 512 * 512


def test_resident_memory_repeats(folder):
    """Two identical processes differ by under one percent."""
    inputs = draw_inputs(input_specs(folder / "a.onnx"), seed=0)
    first, second = (
        run_child("memory", folder / "a.onnx", Setting(), inputs)["steady"]["rss"] for _ in range(2)
    )
    assert abs(first - second) < 0.01 * first


def test_grid_and_one_model(folder):
    """Lists of threads and batches give a cell each; one model alone has no comparison and no control."""
    found = benchmark(
        [folder / "a.onnx"], threads=(1, 2), batch=(1, 2), sessions=2, max_seconds=0.1, memory=False
    )
    assert [(m.cell.threads, m.cell.batch) for m in found.measurements] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [m.shapes["x"][0] for m in found.measurements] == [1, 2, 1, 2]
    assert [m.cpu_time_ms is None for m in found.measurements] == [False, False, True, True]
    assert found.comparisons == ()
    assert {raw.role for raw in found.samples} == {"model"}
    assert "few_sessions" in {warning.name for warning in found.warnings}


def test_same_name_in_two_folders(tmp_path):
    """Files of one name are told apart by their folders, a file given twice by a number."""
    assert names([tmp_path / "m.onnx", tmp_path / "n.onnx"]) == ["m.onnx", "n.onnx"]
    paths = [tmp_path / "one" / "a.onnx", tmp_path / "two" / "a.onnx", tmp_path / "two" / "a.onnx"]
    assert names(paths) == ["one/a.onnx", "two/a.onnx", "two/a.onnx (2)"]


def test_absent_provider(folder):
    """A provider that is not installed is refused with what was asked, what there is and how to get it."""
    with pytest.raises(ProviderError) as caught:
        benchmark([folder / "a.onnx"], providers=("xnnpack",))
    assert "asked for XnnpackExecutionProvider" in str(caught.value)
    assert "CPUExecutionProvider" in str(caught.value)
    assert "--use_xnnpack" in caught.value.hint
    with pytest.raises(ProviderError, match="no execution provider of this name"):
        provider_class("cdua")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_fallback_is_refused(folder, monkeypatch):
    """A session that says it is on another provider than asked is an error, not a number."""
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises((ProviderError, BenchmarkError)) as caught:
        open_session(folder / "a.onnx", Setting("cuda"))
    assert "CUDAExecutionProvider" in str(caught.value)


def test_one_check_of_fallback(folder, monkeypatch):
    """Verification and benchmark refuse a session on another provider by the same check, in the same words."""
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    )
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda path, options, **_: real(path, options))
    openers = (
        lambda: open_session(folder / "a.onnx", Setting("openvino")),
        lambda: sessions.open_session(folder / "a.onnx", optimize=True, provider="openvino"),
    )
    seen = set()
    for opener in openers:
        with pytest.raises(ProviderError, match="ONNX Runtime fell back silently") as caught:
            opener()
        seen.add((caught.value.message, caught.value.hint))
    assert len(seen) == 1


def test_inputs_kept_on_the_device(folder, monkeypatch):
    """With a device of its own a provider is timed with and without copies; the host plays it here."""
    monkeypatch.setitem(DEVICES, CPU, "cpu")
    monkeypatch.setattr(roofline, "DEVICE", roofline.HOST)
    models = [folder / "a.onnx", folder / "same.onnx"]
    found = benchmark(models, sessions=2, max_seconds=0.1, memory=False)
    assert all(measured.compute_ms["p50"] > 0 for measured in found.measurements)
    assert found.comparisons[0].to_json()["compute"]["sessions"] == 2


def test_bfloat16_runs(tmp_path):
    """Types that numpy lacks are fed by their bits and come back with the right values."""
    value = helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, [2, 3])
    output = helper.make_tensor_value_info("y", 1, [2, 3])
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=1)], "g", [value], [output])
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    inputs = draw_inputs(input_specs(path), seed=0)
    session = open_session(path, Setting())
    bind_host(session, inputs)()
    expected = ReferenceEvaluator(model).run(None, inputs)[0]
    np.testing.assert_array_equal(run_outputs(session, inputs)["y"], expected)


def test_given_inputs(folder):
    """Given arrays are what the models run on; missing or misshapen ones are refused."""
    array = np.ones((2, 3, 12, 12), np.float64)
    found = benchmark([folder / "a.onnx"], inputs={"x": array}, sessions=2, max_seconds=0.1, memory=False)
    assert found.measurements[0].shapes == {"x": [2, 3, 12, 12]}
    with pytest.raises(UsageError, match="no array was given"):
        benchmark([folder / "a.onnx"], inputs={"z": array})
    with pytest.raises(UsageError, match="the model takes"):
        benchmark([folder / "a.onnx"], inputs={"x": array[0]})


def test_what_cannot_be_meant(folder, tmp_path):
    """Wrong settings are usage errors, wrong files model errors, before anything is measured."""
    with pytest.raises(UsageError, match="no model to measure"):
        benchmark([])
    with pytest.raises(UsageError, match="there are: batch"):
        benchmark([folder / "a.onnx"], shapes={"sequence": 4})
    for wrong in ({"sessions": 1}, {"max_seconds": 0}, {"threads": -1}, {"batch": 0}, {"providers": ()}):
        with pytest.raises(UsageError):
            benchmark([folder / "a.onnx"], **wrong)
    with pytest.raises(ModelError, match="cannot read"):
        benchmark([tmp_path / "absent.onnx"])


def test_a_model_that_does_not_load(tmp_path):
    """A model that ONNX Runtime refuses is a one-line error from the isolated process."""
    path = convolutions(tmp_path / "model.onnx", 4)
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(BenchmarkError, match="cannot load the model") as caught:
        benchmark([path])
    assert "\n" not in caught.value.message


def test_a_model_that_kills_its_process(tmp_path):
    """A model that crashes ONNX Runtime kills the isolated process; here that is an error with the signal."""
    value = helper.make_tensor_value_info("x", onnx.TensorProto.INT64, [1])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [1])
    least = numpy_helper.from_array(np.array([np.iinfo(np.int64).min]), "least")
    minus = numpy_helper.from_array(np.array([-1]), "minus")
    nodes = [helper.make_node("Div", ["least", "minus"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])]
    graph = helper.make_graph(nodes, "g", [value], [output], [least, minus])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(BenchmarkError, match=r"model\.onnx: ONNX Runtime died of SIG"):
        benchmark([path])
