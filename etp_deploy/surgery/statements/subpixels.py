"""Channels that become pixels and back: DepthToSpace and SpaceToDepth.

Each channel on the side with more space is `blocksize ** 2` channels on the other side: these stay or go together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import frame, has_labels, labelled, plain, single_label
from etp_deploy.surgery.state import Cause, ConflictError
from etp_deploy.surgery.statements.base import Statement, default_layout, set_plain

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.shapes import Structure
    from etp_deploy.surgery.state import State


class Subpixels(Statement):
    """One channel of the coarse-grained tensor is a set of channels of the fine-grained one.

    Args:
        node: the node.
        gathered: for each channel with more space, as rows, the channels that its pixels are.
        spreads: whether the input is the one with more channels (DepthToSpace).
        channels_last: whether, on the side with more channels, those of one pixel stand side by side.
    """

    def __init__(self, node: ir.Node, gathered: np.ndarray, *, spreads: bool, channels_last: bool) -> None:
        super().__init__(node)
        data = node.inputs[0]
        assert data is not None
        self.data, self.out = data, node.outputs[0]
        self.few, self.many = (self.out, data) if spreads else (data, self.out)
        self.gathered = gathered
        self.spreads = spreads
        self.channels_last = channels_last
        self.active = False

    def structure(self, state: State) -> None:
        """Channels are labelled on both sides; a tensor with other labelled axes is left alone."""
        structure, shape = state.structure(self.data), self.out.shape
        if structure is None or shape is None or not self._followed(structure):
            state.pin(self.data, None, "channels become pixels here, or pixels channels", self.node)
            set_plain(state, self.out)
            return
        out = list(plain(shape))
        count = self.gathered.shape[0] if self.spreads else self.gathered.size
        out[1] = labelled(count) if count > 1 else out[1]
        self.active = True
        state.set_structure(self.out, tuple(out))

    def _followed(self, structure: Structure) -> bool:
        others = (factors for axis, factors in enumerate(structure) if axis != 1)
        size = self.gathered.size if self.spreads else self.gathered.shape[0]
        return (
            single_label(structure[1])
            and int(np.prod(frame(structure))) == size
            and not any(map(has_labels, others))
        )

    def constants(self, state: State) -> None:
        """A channel is known where all that its pixels are hold one and the same constant."""
        constant = state.constant(self.data)
        if not self.active or constant is None:
            return
        known, value = constant.known.reshape(-1), constant.value.reshape(-1)
        if self.spreads:
            held = value[self.gathered]
            low = held.min(axis=1)
            known = known[self.gathered].all(axis=1) & (low == held.max(axis=1))
            value = low
        else:
            places = self._places()
            known, value = known[places], value[places]
        shape = frame(state.structure(self.out) or ())
        state.set_constant(self.out, known.reshape(shape), value.reshape(shape))

    def _places(self) -> np.ndarray:
        """Return, for each of the many channels, which of the few it belongs to."""
        places = np.zeros(self.gathered.size, np.int64)
        places[self.gathered] = np.arange(len(self.gathered))[:, None]
        return places

    def spread(self, state: State) -> None:
        """What is one channel on one side stays or goes as a whole on the other."""
        if not self.active:
            return
        few, many = state.mask(self.few), state.mask(self.many)
        kept = few.reshape(-1) | many.reshape(-1)[self.gathered].any(axis=1)
        cause = Cause("channels of the same pixels stay together at", self.node, self.out)
        state.grow(self.few, kept.reshape(few.shape), cause)
        state.grow(self.many, kept[self._places()].reshape(many.shape), cause)

    def layout(self, state: State) -> None:
        """The channels that stay are spread, or gathered, in the order in which the data's stand."""
        if not self.active:
            default_layout(state, self.out)
            return
        order = state.layouts[self.data].reshape(-1)
        pixels = self.gathered.shape[1]
        if not self.spreads:
            made = self.gathered[order]
        else:
            rows = order.reshape(-1, pixels) if self.channels_last else order.reshape(pixels, -1).T
            made = self._places()[rows[:, 0]]
            if not np.array_equal(self.gathered[made], rows):
                raise ConflictError([self.data, self.out])
        if made.ndim > 1:
            made = made.reshape(-1) if self.channels_last else made.T.reshape(-1)
        mask = state.mask(self.out)
        shape = tuple(made.size if extent > 1 else 1 for extent in mask.shape)
        state.layouts[self.out] = made.reshape(shape)
