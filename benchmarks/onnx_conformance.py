"""The onnx package's own test models through the surgery: none may change its function.

Each backend test model (the package's operator cases, the models in its wheel, Debian's libonnx-testdata) that
ONNX Runtime runs is compressed without alignment and run on the test's inputs. Operator cases run twice: as they
are, and with every input but the first made an initializer, so that weights are constants as in a trained network.

    python benchmarks/onnx_conformance.py -o benchmarks/results/onnx_conformance.json
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from etp_deploy.errors import EtpError
from etp_deploy.files import write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from graphs import difference, run, shrunk

if TYPE_CHECKING:
    from collections.abc import Iterator

DEBIAN = Path("/usr/share/libonnx-testdata/data")
LARGEST_INPUT = 100_000_000
# Operators whose output is drawn anew at each run.
RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}

Case = tuple[str, onnx.ModelProto, dict[str, Any]]


def operator_cases() -> Iterator[Case]:
    """Yield the operator cases that the onnx package computes itself."""
    from onnx.backend.test.case.node import collect_testcases  # noqa: PLC0415 - it takes seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        if case.model is None or not case.data_sets:
            continue
        names = [value.name for value in case.model.graph.input]
        feeds = dict(zip(names, case.data_sets[0][0], strict=False))
        yield f"operator/{case.name}", case.model, feeds


def frozen(model: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Any]] | None:
    """Make every input but the first an initializer; None where there is nothing to make one of."""
    names = [value.name for value in model.graph.input]
    rest = [name for name in names[1:] if isinstance(feeds.get(name), np.ndarray)]
    if not rest:
        return None
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for name in rest:
        copy.graph.initializer.append(numpy_helper.from_array(feeds[name], name))
    kept = [value for value in copy.graph.input if value.name not in rest]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    return copy, {name: value for name, value in feeds.items() if name not in rest}


def stored_cases() -> Iterator[Case]:
    """Yield the models with data in the onnx package and in Debian's package."""
    roots = [("wheel", Path(onnx.__file__).parent / "backend/test/data"), ("debian", DEBIAN)]
    for origin, root in roots:
        for path in sorted(root.glob("*/*/model.onnx")):
            sets = sorted(path.parent.glob("test_data_set_*"))
            model = onnx.load(path)
            yield f"{origin}/{path.parent.parent.name}/{path.parent.name}", model, _stored(model, sets)
        for path in sorted(root.glob("light/*.onnx")):
            yield f"{origin}/light/{path.stem}", onnx.load(path), {}


def _stored(model: onnx.ModelProto, sets: list[Path]) -> dict[str, Any]:
    if not sets:
        return {}
    initialized = {item.name for item in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in initialized]
    feeds = {}
    for index, value in enumerate(values):
        file = sets[0] / f"input_{index}.pb"
        if not file.exists():
            continue
        data = file.read_bytes()
        if value.type.HasField("tensor_type"):
            feeds[value.name] = numpy_helper.to_array(onnx.TensorProto.FromString(data))
        elif value.type.HasField("sequence_type"):
            feeds[value.name] = numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    return feeds


def drawn(model: onnx.ModelProto) -> dict[str, Any]:
    """Return random inputs where a model comes without."""
    initialized = {item.name for item in model.graph.initializer}
    random = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        if value.name not in initialized and value.type.HasField("tensor_type"):
            shape = [max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim]
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            if np.prod(shape) < LARGEST_INPUT:
                feeds[value.name] = random.standard_normal(shape).astype(kind)
    return feeds


def verdict(  # noqa: PLR0911 - one for each answer
    model: onnx.ModelProto, feeds: dict[str, Any]
) -> tuple[str, str]:
    """Return what came of one model: not run, equal, equal and smaller, refused, different or crashed, and why."""
    if any(node.op_type in RANDOM for node in model.graph.node):
        return "random", ""
    try:
        expected = run(model, feeds)
    except Exception as error:  # noqa: BLE001 - not every test model is one that ONNX Runtime runs
        return "not run", str(error)[:120]
    try:
        result = shrunk(model)
    except EtpError as error:
        return "refused", str(error)[:300]
    except Exception as error:  # noqa: BLE001 - a crash is a result
        return "crashed", f"{type(error).__name__}: {str(error)[:300]}"
    try:
        got = run(result, feeds)
    except Exception as error:  # noqa: BLE001 - a result that does not run is a result
        return "different", f"does not run: {str(error)[:300]}"
    wrong = _compare(expected, got)
    if wrong is not None:
        return "different", wrong
    return ("equal" if result is model else "equal, edited"), ""


def _compare(expected: list[Any], got: list[Any]) -> str | None:
    if any(not isinstance(item, np.ndarray) for item in expected):
        return None if _same(expected, got) else "a sequence or map differs"
    return difference(expected, got)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))
    return bool(one == other)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="where the JSON goes")
    parser.add_argument("-k", "--only", default="", help="only tests whose name holds this")
    options = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    started = time.monotonic()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    troubles: dict[str, dict[str, str]] = collections.defaultdict(dict)

    def tell(name: str, model: onnx.ModelProto, feeds: dict[str, Any]) -> None:
        if options.only not in name:
            return
        kind, why = verdict(model, feeds)
        counts[name.rsplit("/", 1)[0]][kind] += 1
        if kind in {"refused", "different", "crashed"}:
            troubles[kind][name] = why
            print(f"{kind:10} {name}: {why}", flush=True)

    for name, model, feeds in operator_cases():
        tell(name, model, feeds)
        constants = frozen(model, feeds)
        if constants is not None:
            tell(name.replace("operator/", "operator with constants/"), *constants)
    for name, model, feeds in stored_cases():
        tell(name, model, feeds or drawn(model))
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    ran = sum(number for kind, number in total.items() if kind not in {"not run", "random"})
    for group, numbers in counts.items():
        print(f"{group:32} " + ", ".join(f"{number} {kind}" for kind, number in numbers.most_common()))
    equal = total["equal"] + total["equal, edited"]
    print(f"{ran} ran, {equal} equal, {total['refused']} refused, {ran - equal - total['refused']} wrong")
    if options.output is not None:
        document = {
            "schema": "etp-deploy/onnx-conformance/1",
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "run": ran,
            "equal": equal,
            "of_these_edited": total["equal, edited"],
            "refused": total["refused"],
            "different": total["different"] + total["crashed"],
            "groups": {group: dict(numbers) for group, numbers in counts.items()},
            "troubles": troubles,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_text(options.output, json.dumps(document, indent=1) + "\n")
    return 0 if ran == equal + total["refused"] else 1


if __name__ == "__main__":
    sys.exit(main())
