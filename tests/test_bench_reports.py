"""Pages, tables, the regression gate and the survey of devices, on a document made by hand."""

from __future__ import annotations

import copy
import csv
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from etp_deploy import html, plots
from etp_deploy.bench.cautions import HINTS, Caution
from etp_deploy.bench.fleet import compare_reports
from etp_deploy.bench.gate import evaluate_gate, parse_rule
from etp_deploy.bench.kernels import by_kernel, layout, macs
from etp_deploy.bench.memory import phases
from etp_deploy.bench.page import bench_page
from etp_deploy.bench.text import bytes_text, csv_text, markdown, table
from etp_deploy.errors import BenchmarkError, UsageError

PHASES = ("idle", "load_peak", "loaded", "first_run", "run_peak", "steady", "peak")
CELL = {"provider": "cpu", "threads": 1, "batch": None}


def sessions(level, *, noise=0.01, count=8):
    """Raw sessions around a level in nanoseconds, spread evenly by the noise."""
    found = []
    for at in range(count):
        time = int(level * (1 + noise * (2 * at / (count - 1) - 1)))
        found.append(
            {"passes": 1, "creation_ns": 10, "first_run_ns": 10, "wall_ns": [time] * 4, "cpu_ns": [time] * 4}
        )
    return found


def measurement(level):
    """What one model took in the only setting."""
    times = dict.fromkeys(("p50", "p90", "p95", "p99", "mean", "min"), level / 1000000.0) | {"samples": 32}
    memory = {f"{phase}_rss_bytes": 60_000_000 for phase in PHASES}
    sizes = ("weights_bytes", "activation_peak_bytes", "steady_pss_bytes", "device_bytes")
    memory |= dict.fromkeys(sizes, 1000)
    memory |= {
        "peak_above_idle_bytes": 1000,
        "steady_above_idle_bytes": 1000,
        "timeline": [[0.0, "idle", 60_000_000]],
    }
    return {
        **CELL,
        "shapes": {"x": [1, 3]},
        "latency_ms": times,
        "cpu_time_ms": dict(times),
        "compute_ms": None,
        "throughput_per_s": 10.0,
        "session_creation_ms": 1.0,
        "first_run_ms": 1.0,
        "memory": memory,
        "nodes": [
            {
                "node": "n",
                "kernel": "Conv",
                "us": 3.0,
                "macs": None,
                "parameter_bytes": 1,
                "roofline_share": None,
            }
        ],
        "roof": {"macs_per_s": 1e9, "bytes_per_s": 1e9},
        "partitions": {"CPUExecutionProvider": 1},
        "layout": {
            "blocked": 1,
            "left": [{"node": "n<1>", "kernel": "FusedConv", "us": 3, "reason": "odd"}],
            "reorders": 0,
        },
        "energy": {"available": False, "reason": "no counters"},
    }


def document(*, name="model.onnx", level=1_000_000, noise=0.01):
    """A result of two models, the second twice as fast."""
    bounds = {"ratio": 0.5, "low": 0.48, "high": 0.52, "sessions": 8}
    kernel = {"kernel": "Conv<b>"} | {
        f"{side}_{what}": 1 for side in ("baseline", "contender") for what in ("nodes", "us", "macs", "bytes")
    }
    comparison = {
        "baseline": name,
        "contender": "small.onnx",
        **CELL,
        "clock": "cpu",
        **bounds,
        "speedup": 2.0,
        "verdict": "faster",
        "stopped": "decided",
        "wall": bounds,
        "control": bounds | {"ratio": 1.0},
        "compute": None,
        "outputs": {"compared": True, "max_abs_difference": 0.0, "agree": True},
        "kernels": [kernel],
    }
    models = [
        {
            "name": model,
            "sha256": "0" * 64,
            "bytes": 5000,
            "parameters": 3,
            "measurements": [measurement(time)],
        }
        for model, time in ((name, level), ("small.onnx", level / 2))
    ]
    samples = [
        {"model": model, **CELL, "role": "model", "sessions": sessions(time, noise=noise)}
        for model, time in ((name, level), ("small.onnx", level / 2))
    ]
    environment = {
        "cpu": "A <processor>",
        "flags": ["avx2"],
        "cores": {"physical": 2, "usable": 2},
        "quota": None,
        "governor": None,
        "machine": "x86_64",
        "system": "Linux",
        "kernel": "6",
        "memory_bytes": {"total": 1, "available": 1},
        "load": 0.1,
        "python": "3.11",
        "versions": {"onnxruntime": "1.32.0"},
        "gpus": [],
    }
    return {
        "schema": "etp-deploy/bench/1",
        "created": "2026-01-01",
        "environment": environment,
        "models": models,
        "comparisons": [comparison],
        "warnings": [Caution("load", "5 on 2 cores").to_json()],
        "samples": samples,
    }


class Checker(HTMLParser):
    """Notes tags left open, scripts that would run, and anything fetched from elsewhere."""

    VOID = frozenset({"meta", "br", "img", "input", "line", "rect", "circle", "polyline"})

    def __init__(self):
        """Start with nothing open."""
        super().__init__()
        self.open, self.outside, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        """Remember what opens."""
        self.tags.append(tag)
        given = dict(attrs)
        self.outside += [given[key] for key in ("src", "href") if key in given]
        if tag == "script" and given.get("type") != "application/json":
            self.outside.append("script")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        """Check what closes."""
        if tag not in self.VOID:
            assert self.open.pop() == tag


def checked(page):
    """Parse a page and assert that it is well formed and complete in itself."""
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.outside == []
    assert not re.search(r"url\(|@import|https?://", page)
    return checker


def test_page_is_self_contained_and_escaped():
    """The page holds every part, needs nothing from elsewhere, and shows markup in names as text."""
    page = bench_page(document(name="<script>alert(1)</script>.onnx"))
    checker = checked(page)
    assert checker.tags.count("svg") >= 4
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    for text in ("2.00x", "faster", "5 on 2 cores", "Conv&lt;b&gt;", "n&lt;1&gt;"):
        assert text in page
    assert "prefers-color-scheme: dark" in page
    assert "viewport" in page


def test_memory_by_phase():
    """The page shows every phase in order; one that is not known is left out, not drawn as nothing."""
    found = document()
    used = found["models"][0]["measurements"][0]["memory"]
    names = ["imported", "load peak", "loaded", "first run", "steady", "run peak", "peak"]
    assert list(phases(used)) == names
    places = [bench_page(found).index(f">{name}</text>") for name in names]
    assert places == sorted(places)
    for model in found["models"]:
        model["measurements"][0]["memory"] |= dict.fromkeys(
            ("load_peak_rss_bytes", "run_peak_rss_bytes", "peak_rss_bytes")
        )
        del model["measurements"][0]["memory"]["first_run_rss_bytes"]
    assert list(phases(used)) == ["imported", "loaded", "steady"]
    assert ">load peak</text>" not in bench_page(found)


def test_plots_of_nothing_and_of_one_point():
    """Empty series, a single value and zeros give pictures, not errors."""
    checked(plots.bars([]))
    checked(plots.bars([("a", {"x": 0.0})], unit="ms"))
    checked(plots.distribution({"a": [1.0], "b": []}))
    assert plots.distribution({}) == ""
    assert plots.lines({}) == ""
    checked(plots.lines({"a": [(0.0, 0.0)]}))
    checked(plots.channel_map([("axis", [True] * 3 + [False] * 300), ("empty", [])]))


def test_data_cannot_leave_its_element():
    """A closing tag inside the data that a page carries stays data."""
    page = html.page("t", [], data={"x": "</script><b>"})
    assert checked(page).tags.count("b") == 0


def test_table_markdown_and_csv():
    """The terminal's table, Markdown and CSV say the same numbers."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(document()))
    shown = console.export_text()
    text = markdown(document())
    assert "2.00x faster" in shown
    assert "(1.92 to 2.08)" in shown
    assert "| 2.00x (1.92 to 2.08) | faster |" in text
    assert "| baseline |" in text
    assert "**load**" in text
    lines = list(csv.DictReader(io.StringIO(csv_text(document()))))
    assert [line["model"] for line in lines] == ["model.onnx", "small.onnx"]
    assert [line["latency_p50"] for line in lines] == ["1.0", "0.5"]
    assert [line["verdict"] for line in lines] == ["", "faster"]


def test_the_terminal_table_breaks_no_number():
    """At 100 columns only a model's name may break; columns without numbers are left out."""
    console = Console(width=100, record=True, file=io.StringIO())
    bare = document()
    for model in bare["models"]:
        for measured in model["measurements"]:
            measured["memory"] = None
    console.print(table(document()))
    shown = console.export_text()
    for word in ("activations", "faster", "(1.92 to 2.08)", "cpu 1 thr", "model.onnx"):
        assert word in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100
    console.print(table(bare))
    shown = console.export_text()
    assert "faster" in shown
    assert "memory" not in shown


@pytest.mark.parametrize(
    ("growth", "noise", "expected"),
    [(1.0, 0.01, "passed"), (1.2, 0.01, "regressed"), (0.5, 0.01, "passed"), (1.0, 0.5, "undecided")],
)
def test_gate(growth, noise, expected):
    """A clear growth regresses, none passes, and noise gives undecided instead of an alarm."""
    outcome = evaluate_gate(document(level=1e6 * growth, noise=noise), document(noise=noise), ["p50>5%"])
    assert outcome.status == expected
    assert outcome.exit_code == (expected == "regressed")
    assert expected in outcome.message
    assert len(outcome.findings) == 2


def test_gate_on_memory_and_size():
    """Numbers without noise are compared as they are, to the percent."""
    after = document()
    after["models"][0]["bytes"] = 5101
    after["models"][0]["measurements"][0]["memory"]["peak_rss_bytes"] = 61_000_000
    assert evaluate_gate(after, document(), ["size>2%"]).status == "regressed"
    assert evaluate_gate(after, document(), ["memory>2%"]).status == "passed"
    assert evaluate_gate(after, document(), ["memory>1%"]).status == "regressed"
    assert evaluate_gate(document(), after, ["memory>1%"]).status == "passed"


def test_gate_refuses_another_machine():
    """A baseline from another processor is refused unless that is allowed, and then named."""
    other = document()
    other["environment"] = copy.deepcopy(other["environment"]) | {"cpu": "another"}
    with pytest.raises(BenchmarkError, match="another environment: cpu"):
        evaluate_gate(document(), other, ["p50>5%"])
    outcome = evaluate_gate(document(), other, ["p50>5%"], allow_other_environment=True)
    assert outcome.status == "passed"
    assert outcome.environment


def test_gate_refuses_what_it_cannot_compare():
    """Unknown schemas, models that do not match and unmeasured memory are errors, never passes."""
    with pytest.raises(BenchmarkError, match="not a benchmark result"):
        evaluate_gate(document(), {"schema": "other"}, ["p50>5%"])
    stranger = document(name="stranger.onnx")
    stranger["models"] = stranger["models"][:1]
    with pytest.raises(BenchmarkError, match="none of these models"):
        evaluate_gate(document(), stranger, ["p50>5%"])
    blind = document()
    blind["models"][0]["measurements"][0]["memory"] = None
    with pytest.raises(BenchmarkError, match="was not measured"):
        evaluate_gate(blind, document(), ["memory>5%"])


@pytest.mark.parametrize("text", ["p50", "p50>5", "speed>5%", "p50<5%", "p50>-5%", ""])
def test_unreadable_rules(text):
    """A rule that cannot be read is a usage error that names the metrics."""
    with pytest.raises(UsageError, match="memory"):
        parse_rule(text)


def test_fleet():
    """Reports of several devices come together, and files of one name that differ are pointed out."""
    other = document()
    other["models"][0]["sha256"] = "1" * 64
    other["environment"]["versions"]["onnxruntime"] = "1.20.0"
    found = compare_reports({"one <b>": document(), "two": other})
    assert [entry.device for entry in found.entries] == ["one <b>"] * 2 + ["two"] * 2
    assert any("model.onnx: not the same file" in note for note in found.notes)
    assert any("1.20.0, 1.32.0" in note for note in found.notes)
    assert found.to_json()["schema"] == "etp-deploy/bench-compare/1"
    assert "one &lt;b&gt;" in found.page()
    checked(found.page())
    assert "| two | small.onnx |" in found.markdown()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table())
    assert "2.00x" in console.export_text()


def test_fleet_without_names():
    """Documents in a list are named by their processors, a number where two are alike."""
    found = compare_reports([document(), document()])
    assert {entry.device for entry in found.entries} == {"A <processor>", "A <processor> (2)"}
    with pytest.raises(UsageError, match="no report"):
        compare_reports([])
    with pytest.raises(BenchmarkError, match="not a benchmark result"):
        compare_reports({"x": {}})


def record(kernel, inputs, outputs, *, node="n", us=1.0):
    """One node of ONNX Runtime's profile."""
    return {
        "node": node,
        "kernel": kernel,
        "provider": "CPUExecutionProvider",
        "inputs": [["float", dims] for dims in inputs],
        "outputs": [["float", dims] for dims in outputs],
        "parameter_bytes": 1,
        "activation_bytes": 2,
        "output_bytes": 3,
        "us": us,
    }


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (record("Conv", [[1, 3, 8, 8], [16, 3, 3, 3]], [[1, 16, 8, 8]]), 16 * 64 * 27),
        (record("FusedConv", [[1, 32, 8, 8], [32, 1, 3, 3]], [[1, 32, 8, 8]]), 32 * 64 * 9),
        (record("ConvTranspose", [[1, 4, 5, 5], [4, 6, 2, 2]], [[1, 6, 10, 10]]), 100 * 24),
        (record("MatMul", [[2, 7, 5], [5, 4]], [[2, 7, 4]]), 2 * 7 * 4 * 5),
        (record("Gemm", [[1, 63]], [[1, 10]]), 630),
        (record("Relu", [[1, 63]], [[1, 63]]), None),
    ],
)
def test_macs(node, expected):
    """Multiply-accumulates counted by hand from the shapes."""
    assert macs(node) == expected


@pytest.mark.parametrize(
    ("image", "weight", "reason"),
    [
        ([1, 63, 8, 8], [64, 63, 3, 3], "63 input channels, no multiple of 4"),
        ([1, 62, 8, 8], [62, 31, 3, 3], "31 input channels in each of 2 groups, no multiple of 4"),
        ([1, 255, 8, 8], [255, 1, 3, 3], "depthwise over 255 channels, no multiple of 4"),
    ],
)
def test_reasons_to_leave_the_blocked_layout(image, weight, reason):
    """The channel count that did it is named; a blocked node has no reason."""
    outside = record("FusedConv", [image, weight], [[1, weight[0], 8, 8]])
    inside = {**outside, "kernel": "Conv", "node": "n_nchwc"}
    found = layout([outside, inside])
    assert found["blocked"] == 1
    assert [left["reason"] for left in found["left"]] == [reason]


def test_kernels_side_by_side():
    """Kernels of both models in one table, the largest change first."""
    before = [record("Conv", [[1]], [[1]], us=10.0, node="a_nchwc"), record("Relu", [[1]], [[1]], us=1.0)]
    after = [record("Conv", [[1]], [[1]], us=3.0), record("Relu", [[1]], [[1]], us=2.0)]
    found = by_kernel(before, after)
    assert [(r["kernel"], r["baseline_us"], r["contender_us"]) for r in found] == [
        ("Conv (blocked)", 10.0, 0),
        ("Conv", 0, 3.0),
        ("Relu", 1.0, 2.0),
    ]


def test_words():
    """Bytes are written as people read them, and every warning's name has a hint."""
    assert [bytes_text(n) for n in (None, 0, 999, 1500, 2_000_000)] == ["-", "0 B", "999 B", "1.5 kB", "2 MB"]
    assert all(Caution(name, "").hint for name in HINTS)
