"""What dead channels cost: shares counted by hand, times by nodes however ONNX Runtime calls them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from etp_deploy import compress
from etp_deploy.bench import benchmark, dead
from etp_deploy.bench.page import bench_page
from etp_deploy.bench.text import dead_lines, markdown
from etp_deploy.errors import ModelError

WIDTH, GONE, SIZE = 16, 12, 10


def two_convolutions(path, *, gone=GONE, names=True):
    """Write convolutions of 3 to 16 to 5 channels, of whose 16 so many have neither weights nor bias."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((WIDTH, 3, 3, 3)).astype(np.float32)
    first[:gone] = 0
    second = rng.standard_normal((5, WIDTH, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], name="first" * names, pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu" * names),
        helper.make_node("Conv", ["r0", "w1"], ["y"], name="second" * names, pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "two_convolutions",
        [helper.make_tensor_value_info("x", 1, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", 1, [1, 5, SIZE, SIZE])],
        [numpy_helper.from_array(first, "w0"), numpy_helper.from_array(second, "w1")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def node(name, us, *, macs=1):
    """One measured node."""
    return {"node": name, "us": us, "macs": macs}


def test_shares_by_hand(tmp_path):
    """Counts and shares of weights and work are those that pencil and paper give."""
    found = dead.analyse(two_convolutions(tmp_path / "a.onnx"))
    assert (found["dead"], found["removable"], found["channels"]) == (GONE, GONE, WIDTH + 5)
    assert found["weights"] == GONE * 9 * (3 + 5)
    assert found["weights_share"] == pytest.approx(GONE / WIDTH)
    assert found["macs_share"] == pytest.approx(GONE / WIDTH)
    kept = {row["tensor"]: row["kept"] for row in found["layers"]}
    assert kept["c0"] == "0" * GONE + "1" * (WIDTH - GONE)
    assert found["nodes"] == {"c0": 0.75, "r0": 0.75, "y": 0.75}


def test_nothing_dead_costs_nothing(tmp_path):
    """A model without dead channels has none, and no line is said of it."""
    found = dead.analyse(two_convolutions(tmp_path / "a.onnx", gone=0))
    assert (found["dead"], found["weights"], found["macs_share"], found["nodes"]) == (0, 0, 0.0, {})
    assert dead.cost(found, [node("first", 5.0)])["us"] == 0


@pytest.mark.parametrize("names", [True, False])
def test_nodes_are_found_by_any_of_their_names(tmp_path, names):
    """A blocked node is called by its last tensor, a fused one by a suffix; strangers count by the whole."""
    found = dead.analyse(two_convolutions(tmp_path / "a.onnx", names=names))
    called = ["first", "second/SomeFusion/"] if names else ["r0_nchwc", "y_nchwc"]
    cost = dead.cost(found, [*(node(name, 10.0) for name in called), node("ReorderOutput", 20.0, macs=None)])
    assert cost == {"us": 15.0, "time_share": 0.375, "placed_share": 0.5}
    assert dead.cost(found, [node("stranger", 8.0)]) == {"us": 6.0, "time_share": 0.75, "placed_share": 0.0}


def test_before_and_after(tmp_path):
    """A benchmark of a model and its compressed version has the costs, the line and both channel maps."""
    before = two_convolutions(tmp_path / "a.onnx")
    after = tmp_path / "small.onnx"
    compress(before, after, align="off")
    result = benchmark([before, after], sessions=2, max_seconds=0.1, memory=False)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    (full, small) = (model["dead"] for model in document["models"])
    assert (full["removable"], small["removable"]) == (GONE, 0)
    assert 0 < full["time"][0]["us"] <= 0.75 * sum(n["us"] for n in result.measurements[0].nodes)
    (line,) = dead_lines(document)
    assert line.startswith(f"dead in a.onnx: {GONE} of {WIDTH + 5} channels")
    assert line in markdown(document)
    rows = dict(dead.strips(document, "a.onnx", "small.onnx"))
    assert rows["c0, before"] == [False] * GONE + [True] * (WIDTH - GONE)
    assert rows["c0, after"] == [True] * (WIDTH - GONE)
    page = bench_page(document)
    assert "Dead channels" in page
    assert "c0, after" in page


def test_strips_of_other_models_are_none():
    """A contender that is no narrower, or has layers of its own, is no compressed version."""
    layer = {"tensor": "c0", "kind": "channels", "total": 4, "removable": 2, "kept": "1100"}
    other = layer | {"tensor": "elsewhere", "total": 2, "kept": "11"}

    def strips(contender):
        models = [{"name": "a", "dead": {"layers": [layer]}}, {"name": "b", "dead": {"layers": contender}}]
        return dead.strips({"models": models}, "a", "b")

    assert strips([layer]) == strips([other]) == strips([layer | {"total": 5}]) == []
    assert strips([layer | {"total": 2, "kept": "11", "removable": 0}])


def test_a_failed_analysis_is_a_warning(tmp_path, monkeypatch):
    """Where the analysis fails the numbers are given all the same, with a warning that has a name."""

    def fail(*_args, **_options):
        raise ModelError("the analysis crashed")

    monkeypatch.setattr(dead, "isolated", fail)
    model = two_convolutions(tmp_path / "a.onnx")
    result = benchmark([model], sessions=2, max_seconds=0.1, memory=False)
    document = result.to_json()
    assert document["models"][0]["dead"] is None
    (caution,) = [w for w in document["warnings"] if w["name"] == "dead_unknown"]
    assert caution["message"] == "a.onnx: the analysis crashed"
    assert bench_page(document)
    assert dead_lines(document) == []
