"""What the machine can do at best, measured by ONNX Runtime itself, and how near to it a node comes.

Two small models tell: a matrix product for multiply-accumulates per second, an addition of large arrays for
bytes per second. A node cannot be quicker than its work over the one or its traffic over the other.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from etp_deploy.bench.kernels import macs, moved_bytes
from etp_deploy.bench.sessions import Setting, bind_device, bind_host, open_session
from etp_deploy.sessions import DEVICES, check_provider

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Rows of the product and elements of the addition: on a processor short enough to fit between interruptions
# and large enough to be efficient, on a device large enough to fill it.
HOST = (384, 1 << 22)
DEVICE = (4096, 1 << 26)
SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Roof:
    """The best rates seen in one setting.

    Args:
        macs_per_s: float32 multiply-accumulates in a second.
        bytes_per_s: bytes read and written in a second.
    """

    macs_per_s: float
    bytes_per_s: float

    def share(self, record: Mapping[str, Any]) -> float | None:
        """Least possible time over the node's time; None where its work is not known."""
        work = macs(record)
        if work is None or not record["us"]:
            return None
        least = max(work / self.macs_per_s, moved_bytes(record) / self.bytes_per_s)
        return round(least * 1e6 / float(record["us"]), 4)

    def to_json(self) -> dict[str, float]:
        """As plain values."""
        return dataclasses.asdict(self)


def measure(setting: Setting) -> Roof:
    """Run both small models in a setting and take the shortest times.

    Raises:
        ProviderError: when a session is not on the provider asked for.
    """
    rows, elements = DEVICE if check_provider(setting.provider) in DEVICES else HOST
    with tempfile.TemporaryDirectory(prefix="etp-deploy-") as folder:
        path = Path(folder, "model.onnx")
        product = _best(path, setting, "MatMul", [(rows, rows)] * 2)
        addition = _best(path, setting, "Add", [(elements,)] * 2)
    return Roof(rows**3 / product, 3 * 4 * elements / addition)


def _best(path: Path, setting: Setting, operator: str, shapes: Sequence[tuple[int, ...]]) -> float:
    """Shortest time in seconds of a model of one operator."""
    names = [f"x{at}" for at in range(len(shapes))]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"])],
        "roof",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[0])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    session = open_session(path, setting)
    inputs = {name: np.ones(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
    device = DEVICES.get(check_provider(setting.provider))
    call = bind_device(session, inputs, device) if device else bind_host(session, inputs)
    call()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
