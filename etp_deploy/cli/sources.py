"""What the command line names to read: plainly no model is refused before anything heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from etp_deploy.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

# how protobuf says what follows: a number, eight bytes, a length and as many bytes, four bytes
_NUMBER, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


def check_model(path: Path) -> None:
    """Refuse what is no model file.

    Raises:
        ModelError: with what is there instead.
    """
    if not path.exists():
        raise ModelError("there is no such file", where=str(path), hint="check the path")
    if path.is_dir():
        raise ModelError("this is a folder, not a model file", where=str(path), hint="name the .onnx file")
    if path.is_file() and not _is_message(path):
        # the reader knows best what it is instead
        from etp_deploy.modelfile import read_model  # noqa: PLC0415 - slow

        read_model(path)


def read_inputs(path: Path | None, model: Path) -> dict[str, np.ndarray] | None:
    """Read what `--inputs` names for a model's inputs; None where it names nothing.

    Raises:
        InputError: when there is no such file, or it cannot be read.
        UsageError: when the path holds no inputs, or not this model's.
    """
    if path is None:
        return None
    from etp_deploy.input_files import load_inputs  # noqa: PLC0415 - heavy
    from etp_deploy.inputs import input_specs  # noqa: PLC0415

    return load_inputs(path, input_specs(model))


def _is_message(path: Path) -> bool:
    """Whether a file is one protobuf message from end to end, judged by its outermost fields."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            while file.tell() < size:
                if not _skip_field(file):
                    return False
            return 0 < size == file.tell()
    except OSError:
        return False


def _skip_field(file: BinaryIO) -> bool:
    tag = _varint(file)
    if tag is None or not tag >> 3:
        return False
    kind = tag & 7
    if kind == _NUMBER:
        return _varint(file) is not None
    length = {_EIGHT: 8, _FOUR: 4}.get(kind) if kind != _BYTES else _varint(file)
    if length is None:
        return False
    file.seek(length, 1)
    return True


def _varint(file: BinaryIO) -> int | None:
    """Read a number of seven bits a byte; None where there is none."""
    value = 0
    for place in range(10):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << (7 * place)
        if byte[0] < 0x80:
            return value
    return None
