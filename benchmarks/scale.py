"""How compression grows: with bytes, with nodes, and beside onnxsim.

    python benchmarks/scale.py bytes       # 3 GB of external data, beside plain file calls
    python benchmarks/scale.py nodes       # 1,000, 10,000 and 50,000 nodes
    python benchmarks/scale.py simplifier  # 100 MB, beside onnxsim

Everything compared is measured in one run, turn by turn; results go to `benchmarks/results/scale-*.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from etp_deploy.bench.environment import describe
from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.rewrite import rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
CHUNK = 1 << 24


# models


def perceptrons(path: Path, blocks: int, width: int, hidden: int, *, external: bool) -> None:
    """Write residual perceptrons of which every second neuron is constant; tensors are written one at a time."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    data = path.with_name(f"{path.name}.data")
    x = "x"
    with data.open("wb") as file:

        def add(name: str, array: np.ndarray) -> str:
            if not external:
                tensors.append(numpy_helper.from_array(array, name))
                return name
            tensor = onnx.TensorProto(name=name, data_type=1, dims=array.shape, data_location=1)
            place = {"location": data.name, "offset": file.tell(), "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(array.data)
            tensors.append(tensor)
            return name

        for block in range(blocks):
            first = random.standard_normal((width, hidden), np.float32) / np.float32(width**0.5)
            first[:, ::2] = 0
            second = random.standard_normal((hidden, width), np.float32) / np.float32(hidden**0.5)
            names = [add(f"v{block}", first), add(f"w{block}", second)]
            names.append(add(f"b{block}", random.standard_normal(hidden).astype(np.float32)))
            nodes += [
                helper.make_node("MatMul", [x, names[0]], [f"h{block}"]),
                helper.make_node("Add", [f"h{block}", names[2]], [f"g{block}"]),
                helper.make_node("Relu", [f"g{block}"], [f"r{block}"]),
                helper.make_node("MatMul", [f"r{block}", names[1]], [f"o{block}"]),
                helper.make_node("Add", [f"o{block}", x], [f"y{block}"]),
            ]
            x = f"y{block}"
    if not external:
        data.unlink()
    path.write_bytes(_model(nodes, tensors, ["n", width], x).SerializeToString())


def convolutions(nodes_wanted: int) -> onnx.ModelProto:
    """Return residual blocks of small convolutions with BatchNormalization, an eighth of whose filters are constant."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    x, width, inner = "x", 8, 16
    block = 0
    while len(nodes) < nodes_wanted:
        weights = {
            "v": random.standard_normal((inner, width, 3, 3), np.float32) / 9,
            "w": random.standard_normal((width, inner, 1, 1), np.float32) / 9,
            **{key: random.random(inner, np.float32) + np.float32(0.5) for key in ("s", "b", "m", "q")},
        }
        weights["v"][::8] = 0
        tensors += [numpy_helper.from_array(array, f"{key}{block}") for key, array in weights.items()]
        norm = [f"c{block}", *(f"{key}{block}" for key in ("s", "b", "m", "q"))]
        nodes += [
            helper.make_node("Conv", [x, f"v{block}"], [f"c{block}"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", norm, [f"n{block}"]),
            helper.make_node("Relu", [f"n{block}"], [f"r{block}"]),
            helper.make_node("Conv", [f"r{block}", f"w{block}"], [f"o{block}"]),
            helper.make_node("Add", [f"o{block}", x], [f"y{block}"]),
        ]
        x = f"y{block}"
        block += 1
    return _model(nodes, tensors, ["n", width, 8, 8], x)


def _model(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto], shape: list[Any], out: str) -> Any:
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", out)]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


# measuring


def in_child(command: list[str]) -> dict[str, float]:
    """Run a command; return its wall-clock and CPU seconds and the largest memory of any of its processes in MB."""
    code = (
        "import json, resource, subprocess, sys, time; start = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "wall = time.perf_counter() - start; use = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps({'wall_s': wall, 'cpu_s': use.ru_utime + use.ru_stime, 'peak_mb': use.ru_maxrss / 1024}))"
    )
    done = subprocess.run(  # noqa: S603 - our own interpreter and commands
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def compression(source: Path, destination: Path) -> list[str]:
    """Return the command that compresses without verification."""
    call = "import sys; from etp_deploy.cli import main; sys.exit(main())"
    return [sys.executable, "-c", call, "compress", str(source), "-o", str(destination), "--no-verify"]


def copying(source: Path, destination: Path, written: int) -> list[str]:
    """Return the command that reads one file and writes as many bytes as another has, flushed to the disk."""
    code = (
        "import os, sys; source, destination, left = sys.argv[1], sys.argv[2], int(sys.argv[3]);"
        f"buffer = bytearray({CHUNK}); file = open(source, 'rb', buffering=0)\n"
        "while file.readinto(buffer): pass\n"
        "out = open(destination, 'wb', buffering=0)\n"
        "while left > 0: left -= out.write(buffer[:left])\n"
        "os.fsync(out.fileno())"
    )
    return [sys.executable, "-c", code, str(source), str(destination), str(written)]


def measure_bytes(folder: Path, repeats: int) -> dict[str, Any]:
    """3 GB of external data: time beside plain file calls, peak memory."""
    source, result = folder / "large.onnx", folder / "small.onnx"
    perceptrons(source, 48, 2048, 4096, external=True)
    rounds: dict[str, list[dict[str, float]]] = {"compress": [], "file calls": []}
    for _ in range(repeats):
        rounds["compress"].append(in_child(compression(source, result)))
        data = result.with_name("small.onnx.data")
        written = data.stat().st_size
        plain = copying(source.with_name("large.onnx.data"), folder / "copy", written)
        rounds["file calls"].append(in_child(plain))
        for made in (folder / "copy", data, result):
            made.unlink()
    ratios = {
        key: statistics.median(
            a[key] / b[key] for a, b in zip(rounds["compress"], rounds["file calls"], strict=True)
        )
        for key in ("wall_s", "cpu_s")
    }
    return {
        "source_bytes": source.with_name("large.onnx.data").stat().st_size,
        "result_bytes": written,
        "rounds": rounds,
        "median_ratio": ratios,
        "peak_mb": max(item["peak_mb"] for item in rounds["compress"]),
    }


def measure_nodes(_: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds of preparing, planning and rewriting on one thread, by number of nodes."""
    found: dict[str, Any] = {}
    for count in (1_000, 10_000, 50_000):
        times = [_surgery_seconds(count) for _ in range(repeats if count < 50_000 else 1)]
        found[str(count)] = {"cpu_s": times, "us_per_node": statistics.median(times) / count * 1e6}
    return found


def _surgery_seconds(count: int) -> float:
    import onnx_ir as ir  # noqa: PLC0415 - counted nowhere

    model = ir.from_proto(convolutions(count))
    used = time.process_time()
    prepared = prepare(model)
    removal, _ = plan(prepared.graph)
    rewrite(prepared, removal.edits)
    return time.process_time() - used


def measure_simplifier(folder: Path, repeats: int) -> dict[str, Any]:
    """100 MB: compression, its own use of onnxsim included, beside onnxsim alone."""
    source = folder / "model.onnx"
    perceptrons(source, 6, 1024, 2048, external=False)
    simplify = [sys.executable, "-m", "onnxsim", str(source), str(folder / "simplified.onnx")]
    rounds: dict[str, list[dict[str, float]]] = {"compress": [], "onnxsim": []}
    for _ in range(repeats):
        rounds["compress"].append(in_child(compression(source, folder / "small.onnx")))
        rounds["onnxsim"].append(in_child(simplify))
    ratios = {
        key: statistics.median(
            a[key] / b[key] for a, b in zip(rounds["compress"], rounds["onnxsim"], strict=True)
        )
        for key in ("wall_s", "cpu_s", "peak_mb")
    }
    return {"source_bytes": source.stat().st_size, "rounds": rounds, "median_ratio": ratios}


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "bytes": measure_bytes,
    "nodes": measure_nodes,
    "simplifier": measure_simplifier,
}


def main() -> None:
    """Measure one part and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are made (3 GB and more for bytes)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = PARTS[options.part](Path(folder), options.repeats)
    found = {"measured": options.part, "environment": describe(), **found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"scale-{options.part}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
