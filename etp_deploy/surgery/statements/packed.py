"""Matrix products with weights of a few bits an entry, packed into bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.statements.base import SetAttribute, SetInput, array_of
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.quantized import input_of
from etp_deploy.surgery.statements.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State
    from etp_deploy.surgery.statements.base import Edit


class PackedContraction(Contraction):
    """MatMulNBits: rows of a few bits an entry, packed into bytes, a scale for each block of input channels.

    Args:
        node: the node.
        bits: of an entry.
        block: how many input channels share a scale.
    """

    PACKED, SCALES, ZEROS, BIAS = 1, 2, 3, 5

    def __init__(self, node: ir.Node, *, bits: int, block: int) -> None:
        data = node.inputs[0]
        axis = 0 if data is None or data.shape is None else len(data.shape) - 1
        weight = Weight(self.PACKED, out=0, contracted=1)
        super().__init__(node, data=0, data_axis=axis, out_axis=axis, weight=weight, bias=self.BIAS)
        self.bits = bits
        self.block = block

    def _parameter(self, index: int) -> np.ndarray | None:
        return array_of(input_of(self.node, index))

    def _array(self) -> np.ndarray:
        """Return the weight, (output, input)."""
        packed, scales = self._parameter(self.PACKED), self._parameter(self.SCALES)
        assert packed is not None
        assert scales is not None
        rows, blocks = packed.shape[:2]
        by_block = (rows, blocks, 1)
        entries = unpacked(packed.reshape(rows, -1), self.bits).reshape(rows, blocks, self.block)
        centred = entries.astype(np.float32) - self._points(rows, blocks).reshape(by_block)
        values = centred * scales.astype(np.float32).reshape(by_block)
        size = self.node.attributes.get_int("K", 0)
        weight: np.ndarray = values.reshape(rows, -1)[:, :size].astype(scales.dtype)
        return weight

    def _points(self, rows: int, blocks: int) -> np.ndarray:
        """Return the zero point of each row's blocks."""
        zeros = self._parameter(self.ZEROS)
        if zeros is None:
            return np.full((rows, blocks), 1 << (self.bits - 1), np.float32)
        if zeros.dtype != np.uint8:
            return zeros.reshape(rows, blocks).astype(np.float32)
        return unpacked(zeros.reshape(rows, -1), self.bits)[:, :blocks].astype(np.float32)

    def _block(self) -> int:
        return self.block

    def _weight_edits(self, state: State, channels: np.ndarray, carried: np.ndarray | None) -> Iterator[Edit]:
        """Take rows and blocks of everything that belongs to the weight."""
        del carried
        packed, scales, zeros = (self._parameter(index) for index in (self.PACKED, self.SCALES, self.ZEROS))
        assert packed is not None
        assert scales is not None
        rows, blocks = packed.shape[:2]
        columns = (
            self._input_order(state) if self._data_dims else np.arange(self.node.attributes.get_int("K", 0))
        )
        taken = columns[:: self.block] // self.block
        at = np.ix_(channels, taken)
        flat = scales.ndim == 1
        cut = scales.reshape(rows, blocks)[at]
        yield SetInput(self.PACKED, packed[at])
        yield SetInput(self.SCALES, cut.reshape(-1) if flat else cut)
        if zeros is not None:
            points = self._points(rows, blocks)[at]
            kept = packed_rows(points, self.bits) if zeros.dtype == np.uint8 else points.astype(zeros.dtype)
            yield SetInput(self.ZEROS, kept.reshape(-1) if zeros.ndim == 1 else kept)
        yield SetAttribute("K", len(columns))
        yield SetAttribute("N", len(channels))


def unpacked(rows: np.ndarray, bits: int) -> np.ndarray:
    """Return the entries that rows of bytes hold, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    entries: np.ndarray = (rows[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return entries.reshape(rows.shape[0], -1)


def packed_rows(entries: np.ndarray, bits: int) -> np.ndarray:
    """Return rows of bytes that hold entries, the lowest bits first."""
    each = 8 // bits
    filled = np.pad(entries.astype(np.uint8), ((0, 0), (0, -entries.shape[1] % each)))
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    joined: np.ndarray = np.bitwise_or.reduce(filled.reshape(len(entries), -1, each) << shifts, axis=2)
    return joined
