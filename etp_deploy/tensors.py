"""The data of tensors: mapped for a moment, made when it is written, streamed from file to file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import onnx_ir as ir

from etp_deploy.errors import ModelError
from etp_deploy.worker import first_line

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

# what computed tensors of this size and more hold is made when they are written
_DEFERRED_FROM_BYTES = 1 << 20


def unshared(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a tensor whose mapping of a file, if it has one, ends with whoever asked for its data.

    The model's own tensor would keep every page that was ever touched in memory.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return _reopened(tensor, tensor.location, tensor.base_dir)


def elsewhere(tensor: ir.ExternalTensor, file: Path) -> ir.ExternalTensor:
    """Return an external tensor that lies in another file at the same place."""
    return _reopened(tensor, file.name, file.parent)


def _reopened(
    tensor: ir.ExternalTensor, location: str | os.PathLike[str], base_dir: str | os.PathLike[str]
) -> ir.ExternalTensor:
    shape, name = ir.Shape(tensor.shape.numpy()), tensor.name or ""
    place = tensor.offset, tensor.length, tensor.dtype
    return ir.ExternalTensor(location, *place, shape=shape, name=name, base_dir=base_dir)


def deferred(
    make: Callable[[], np.ndarray], dtype: ir.DataType, shape: ir.ShapeProtocol, name: str | None
) -> ir.TensorProtocol:
    """Return a tensor whose data is made when it is asked for, each time anew; a small one is made at once."""

    def tensor() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make()), dtype=dtype, name=name)

    fixed = ir.Shape(shape.numpy())
    if not _is_large(fixed, dtype):
        return tensor()
    return ir.LazyTensor(tensor, dtype, fixed, name=name)


def is_deferred(tensor: ir.TensorProtocol) -> bool:
    """Return whether what is cut of a tensor, if it is all, is made when it is asked for."""
    return _is_large(tensor.shape, tensor.dtype)


def _is_large(shape: ir.ShapeProtocol, dtype: ir.DataType) -> bool:
    return math.prod(shape.numpy()) * dtype.itemsize >= _DEFERRED_FROM_BYTES


def stream(tensor: ir.TensorProtocol, file: BinaryIO) -> int:
    """Write a tensor's bytes; return how many there were."""
    started = file.tell()
    source = unshared(tensor)
    try:
        if isinstance(source, ir.ExternalTensor | ir.LazyTensor | ir.Tensor):
            source.tofile(file)  # from file to file where the system can, and never as bytes of its own
        else:
            file.write(source.tobytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"a tensor cannot be read: {first_line(error)}", where=tensor.name or "") from error
    return file.tell() - started


def in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """Return an external tensor's data as a tensor of the model itself.

    Raises:
        ModelError: when it cannot be read.
    """
    try:
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"external data cannot be read: {first_line(error)}", where=str(tensor.path)
        ) from error
