"""Tables on a terminal: no name broken into shreds, no number dropped, every reason on a line of its own."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from etp_deploy.cli.tables import compression, inspection, shortened

QUERY = "/encoder/layer.0/attention/self/query/MatMul_output_0"
KEY = "/encoder/layer.0/attention/self/key/MatMul_output_0"


def layer(name, *, total=64, constant=20, unread=4, kept=48, reasons=()):
    """Return a row as the document of an inspection has it."""
    return {
        "name": name,
        "operator": "MatMul",
        "kind": "projections",
        "total": total,
        "constant": constant,
        "unread": unread,
        "kept": kept,
        "removable": total - kept,
        "kept_dead": constant + unread - (total - kept),
        "reasons": reasons,
    }


def document(*layers, **changes):
    """Return an inspection with these layers."""
    keys = ("total", "constant", "unread", "removable", "kept_dead")
    totals = {"projections": {key: sum(row[key] for row in layers) for key in keys}}
    plain = {"align": "auto", "target": "cpu-avx2", "by_align": {}, "nearly_dead": {}, "merged_duplicates": 0}
    return {"layers": list(layers), "totals": totals, **plain, **changes}


def drawn(parts, width):
    """Print on a terminal of this width; return its lines."""
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False)
    for part in parts:
        console.print(part)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_long_name_loses_its_middle():
    """Whole where it fits, then without the exporter's ending, then without its middle; never too long."""
    assert shortened(KEY, 51) == KEY
    assert shortened(KEY, 43) == "/encoder/layer.0/attention/self/key/MatMul…"
    assert shortened(KEY, 30) == "/encoder/layer…elf/key/MatMul…"
    assert shortened("a" * 20 + "b" * 20, 11) == "aaaaa…bbbbb"
    for width in range(4, 60):
        assert len(shortened(QUERY, width)) <= width


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_layer_is_one_line_with_all_its_numbers(width):
    """Total, constant, unread, removable and kept stand in one line; names can be told apart unless it is narrow."""
    lines = drawn(inspection(document(layer(QUERY), layer(KEY)), everything=False), width)
    rows = [line.split() for line in lines if line.strip().startswith("/enc")]
    assert [row[1:] for row in rows] == [["MatMul", "projections", "64", "20", "4", "16", "48"]] * 2
    assert (rows[0][0] != rows[1][0]) == (width > 80)
    assert all(len(line) <= width for line in lines)
    totals = "projections: 128, of which 48 dead (40 constant, 8 unread); 32 removable, 96 kept"
    assert totals in " ".join(lines)


def test_each_reason_has_its_line():
    """What is kept although dead is listed by tensor and reason, with how many."""
    reasons = (("rounded up to a multiple of 8", 7), ("carries the constants", 1))
    lines = drawn(inspection(document(layer("c0", reasons=reasons)), everything=False), 100)
    at = next(place for place, line in enumerate(lines) if "kept although dead" in line)
    found = [" ".join(line.split()) for line in lines[at + 2 : at + 4]]
    assert found == ["c0 7 rounded up to a multiple of 8", "c0 1 carries the constants"]


def test_layers_with_nothing_dead_are_counted():
    """They are left out unless asked for, and one is called one."""
    whole = layer("whole", constant=0, unread=0, kept=64)
    found = document(layer("c0"), whole)
    lines = drawn(inspection(found, everything=False), 100)
    assert "1 layer with nothing dead is left out; --all shows all" in lines
    assert not any("whole" in line for line in lines)
    assert any("whole" in line for line in drawn(inspection(found, everything=True), 100))


def test_what_other_options_would_change():
    """Alignments, thresholds and merged channels are told; thresholds without effect as well."""
    found = document(layer("c0"), by_align={"off": 20, "4": 16}, nearly_dead={"1e-06": 0, "0.01": 3})
    lines = drawn(inspection(found | {"merged_duplicates": 2}, everything=False), 100)
    assert lines[-4:] == [
        "merged as multiples of others: 2",
        "--align auto is here what the rule for cpu-avx2 says; nothing was measured",
        "removable in all by --align: off: 20, 4: 16",
        "more output channels that --zero-below would take for dead: 1e-06: 0, 0.01: 3",
    ]
    asked = drawn(inspection(found | {"align": 4}, everything=False), 100)
    assert not any("rule" in line for line in asked)
    none = document(layer("c0"), nearly_dead={"1e-06": 0, "0.01": 0})
    assert drawn(inspection(none, everything=False), 100)[-1] == (
        "--zero-below, up to 0.01, would take no more output channels for dead"
    )


def test_a_long_list_of_kept_channels_ends_in_their_sum():
    """A compression shows the first twelve reasons, and how many channels the others have."""
    kept = [{"tensor": f"c{place}", "count": 2, "reason": "why"} for place in range(15)]
    sizes = {key: {"before": 2, "after": 1} for key in ("parameters", "bytes", "macs", "nodes")}
    found = {
        **sizes,
        "source": "a.onnx",
        "destination": "b.onnx",
        "layers": [],
        "removed": {},
        "merged_duplicates": 0,
        "kept_dead": kept,
        "verification": None,
        "alignment": {"used": "4", "target": "cpu-avx2", "times": {"off": 1.0, "4": 0.9}},
        "zero_below": {"used": 0.0, "at_1e-6_more_dead_channels": 0},
        "seconds": {},
    }
    lines = drawn(compression(found), 100)
    assert any(line.split() == ["and", "3", "more", "6", "see", "--json", "or", "--report"] for line in lines)
    measured = "measured here, time against exact counts: off: 1.00, 4: 0.90"
    assert f"channel counts at multiples of 4, for cpu-avx2; {measured}" in " ".join(lines)
