"""All checks that need an NVIDIA GPU, in one go, into one JSON file.

Where ONNX Runtime has no CUDA provider, one line says so and the command succeeds: there is nothing to check.

    python benchmarks/cuda_checks.py -o benchmarks/results/cuda.json [MODEL.onnx CONTENDER.onnx ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort

from etp_deploy.bench import benchmark
from etp_deploy.bench.sessions import Setting, open_session
from etp_deploy.errors import EtpError, ProviderError
from etp_deploy.files import write_text

sys.path.insert(0, str(Path(__file__).parent))
from pairs import equal_layers

WIDTHS = (64, 63, 61, 60, 56, 48, 33, 32)
MEMORY_SPREAD = 0.01


def check(name: str, passed: bool, **seen: Any) -> dict[str, Any]:
    """One finding, printed as it comes."""
    print(f"{'ok  ' if passed else 'FAIL'} {name}: {json.dumps(seen)}", file=sys.stderr)
    return {"check": name, "passed": passed, **seen}


def provider_checks(model: Path) -> list[dict[str, Any]]:
    """A session asked for on CUDA is on CUDA."""
    session = open_session(model, Setting("cuda"))
    return [check("session is on CUDA", session.get_providers()[0] == "CUDAExecutionProvider")]


def pair_checks(models: list[Path], label: str) -> list[dict[str, Any]]:
    """Outputs as on the CPU, copies told apart from compute, device memory measured, verdicts given."""
    document = benchmark(models, providers=("cuda", "cpu"), batch=None).to_json()
    document.pop("samples")
    found = []
    for model in document["models"]:
        (measured,) = [m for m in model["measurements"] if m["provider"] == "cuda"]
        both = {"end_to_end_ms": measured["latency_ms"]["p50"], "compute_ms": measured["compute_ms"]["p50"]}
        found.append(
            check(f"{label}: compute within end to end", both["compute_ms"] <= both["end_to_end_ms"], **both)
        )
        used = measured["memory"]["device_bytes"]
        found.append(
            check(f"{label}: device memory is known", used is not None, model=model["name"], bytes=used)
        )
        spread = measured["memory"]["spread"]
        found.append(check(f"{label}: memory repeats", spread < MEMORY_SPREAD, spread=spread))
    for comparison in document["comparisons"]:
        if comparison["provider"] == "cuda":
            against = comparison["outputs"].get("against_cpu", {})
            found.append(check(f"{label}: outputs as on the CPU", bool(against.get("agree")), **against))
    return [*found, {"check": f"{label}: result", "passed": True, "document": document}]


def width_study(folder: Path) -> dict[str, Any]:
    """Time of equal stacks at aligned and odd widths, relative to the widest: is there a cliff?"""
    paths = [equal_layers(folder / f"w{w}.onnx", 8, channels=w, size=56) for w in WIDTHS]
    document = benchmark(paths, providers=("cuda",), batch=None, memory=False, max_seconds=60.0).to_json()
    ratios = {w: c["ratio"] for w, c in zip(WIDTHS[1:], document["comparisons"], strict=True)}
    computes = {w: c["compute"]["ratio"] for w, c in zip(WIDTHS[1:], document["comparisons"], strict=True)}
    return {"check": "widths", "passed": True, "end_to_end": ratios, "compute": computes}


def main() -> int:
    """Run every check; without CUDA say so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="a baseline and contenders besides our own pair")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/cuda.json"))
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            first = equal_layers(Path(folder, "ten.onnx"), 10, channels=64, size=56)
            second = equal_layers(Path(folder, "five.onnx"), 5, channels=64, size=56)
            checks = provider_checks(first)
            checks += pair_checks([first, second], "ten layers and five")
            checks += pair_checks(options.models, "given models") if options.models else []
            checks.append(width_study(Path(folder)))
    except ProviderError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 0 if "CUDAExecutionProvider" not in ort.get_available_providers() else 1
    except EtpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    passed = all(found["passed"] for found in checks)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": "etp-deploy/cuda-checks/1", "passed": passed, "checks": checks}
    write_text(options.output, json.dumps(document, indent=1) + "\n")
    print(f"{'passed' if passed else 'failed'}: {options.output}", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
