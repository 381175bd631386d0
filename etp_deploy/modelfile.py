"""ONNX files in and out: what is read is a whole, self-contained model; what is written appears whole.

Reading refuses what other readers accept (empty files, duplicate initializers, weights outside the model's
folder) before any native code sees it. Writing keeps the model's IR version, opsets and names and drops what
exporters and optimizers leave behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google.protobuf.message  # type: ignore[import-untyped] # protobuf ships no types
import onnx
import onnx_ir as ir

from etp_deploy.errors import ModelError, OutputError
from etp_deploy.files import check_output, whole_file
from etp_deploy.modelcheck import check_proto
from etp_deploy.modelstrip import strip
from etp_deploy.tensors import elsewhere, in_memory, stream
from etp_deploy.worker import first_line, isolated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# A model whose weights lay outside keeps them there if there are this many bytes of them: they are never all in memory.
STREAMED_FROM_BYTES = 256 << 20
# Protobuf refuses messages of 2 GiB; the graph itself needs some of it.
INLINE_LIMIT_BYTES = 1_900_000_000
# Tensors that shape inference looks into (shapes, axes, scales) stay inside the model.
_EXTERNAL_FROM_BYTES = 1024
_ALIGN_BYTES = 64

_ONNX_HINT = "an ONNX model file is expected"
_MAGIC = (
    (b"PK\x03\x04", "a zip archive, most likely a PyTorch checkpoint", "export it first: etp-deploy export"),
    (b"\x80\x02", "a pickle, most likely a PyTorch checkpoint", "export it first: etp-deploy export"),
    (b"\x80\x04", "a pickle", _ONNX_HINT),
    (b"\x80\x05", "a pickle", _ONNX_HINT),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file", _ONNX_HINT),
    (b"\x89PNG", "an image", _ONNX_HINT),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "fetch it: git lfs pull"),
    (b"{", "a text file", _ONNX_HINT),
    (b"<", "a text file", _ONNX_HINT),
)


def read_model(path: Path | str) -> ir.Model:
    """Read an ONNX model; external data stays on disk and is memory-mapped when a tensor is used.

    Args:
        path: a regular file in ONNX's binary format.

    Raises:
        ModelError: when the file is missing, not a regular file, empty, truncated or not ONNX; when it has no
            graph, no opset or two initializers of one name; when a tensor's data is missing, too short, or
            outside the model's folder.
    """
    path = Path(path)
    data = _read_bytes(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except google.protobuf.message.DecodeError as error:
        raise _not_onnx(path, data) from error
    del data
    check_proto(proto, path)
    model: ir.Model = _converted(ir.from_proto, proto, path)
    for tensor in _external_tensors(model):
        tensor.base_dir = path.absolute().parent
    return model


def write_model(
    model: ir.Model,
    path: Path | str,
    *,
    inputs: Sequence[Path | str] = (),
    external_data: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model whole or not at all; the model itself is not changed.

    Tensors go into one file beside the model, written first, when `external_data` is asked for or they exceed
    1.9 GB. That file gets a name not in use, so that an older model at `path` stays valid until the new one
    replaces it; data that only the older model used is then removed.

    Args:
        model: the model; tensors are streamed one at a time.
        path: the .onnx file to write.
        inputs: model files that must not be overwritten.
        external_data: write tensors beside the model even when it is small.
        metadata: entries to set among the model's own `metadata_props`.

    Raises:
        OutputError: when the destination cannot be written or is one of the inputs.
        ModelError: when a tensor's data cannot be read.
    """
    path = Path(path)
    superseded = _superseded(path, inputs)
    copy = _converted(ir.Model.clone, model, path)
    copy.metadata_props.update(metadata or {})
    _inline_attributes(copy)
    written: Path | None = None
    try:
        if external_data or _tensor_bytes(copy) > INLINE_LIMIT_BYTES:
            written = _free_name(path)
            _write_tensors(copy, written)
        else:
            _inline_initializers(copy)
        proto = _converted(ir.to_proto, copy, path)
        strip(proto)
        with whole_file(path) as temporary:
            temporary.write_bytes(_serialized(proto, path))
    except BaseException:
        if written is not None:
            written.unlink(missing_ok=True)
        raise
    for old in superseded:
        old.unlink(missing_ok=True)


def move_model(source: Path, path: Path | str, *, inputs: Sequence[Path | str] = ()) -> None:
    """Rename a model that `write_model` wrote, with its data, to another place on the same file system.

    Args:
        source: the model file; gone afterwards.
        path: the .onnx file to make of it, whole or not at all, as `write_model` does.
        inputs: model files that must not be overwritten.

    Raises:
        OutputError: when the destination cannot be written or is one of the inputs.
    """
    path = Path(path)
    superseded = _superseded(path, inputs)
    data = _data_files(source)
    assert len(data) <= 1, "write_model writes one data file"
    moved = _free_name(path) if data else None
    try:
        with whole_file(path) as temporary:
            for file in data:
                assert moved is not None
                model = read_model(source)
                for value, tensor in _initializers(model).items():
                    if isinstance(tensor, ir.ExternalTensor):
                        value.const_value = elsewhere(tensor, moved)
                file.replace(moved)
                temporary.write_bytes(_serialized(ir.to_proto(model), path))
            if not data:
                source.replace(temporary)
    except BaseException:
        if moved is not None:
            moved.unlink(missing_ok=True)
        raise
    source.unlink(missing_ok=True)
    for old in superseded:
        old.unlink(missing_ok=True)


def _superseded(path: Path, inputs: Sequence[Path | str]) -> set[Path]:
    """Return the data files that a new model at `path` makes useless, once it is known not to hit an input."""
    sources = tuple(Path(source) for source in inputs)
    sources_data = {file for source in sources for file in _data_files(source)}
    check_output(path, inputs=(*sources, *sources_data))
    return _own_data_files(path) - sources_data


def check_model(path: Path | str, *, full: bool = False, timeout_s: float = 120.0) -> None:
    """Run ONNX's checker on a file, in a process of its own.

    Args:
        path: the model file.
        full: also run strict shape inference.
        timeout_s: wall-clock limit in seconds.

    Raises:
        ModelError: when the checker refuses the model, crashes or does not finish.
    """
    isolated("etp_deploy.modelfile:_run_checker", str(path), full=full, timeout_s=timeout_s)


def _read_bytes(path: Path) -> bytes:
    """Read a regular file; never wait on a FIFO, never read a device."""
    try:
        # Not blocking: opening a FIFO for reading would otherwise wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"cannot read the model: {reason}", where=str(path), hint="check the path"
        ) from error
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            hint = "name the .onnx file in it"
            raise ModelError("this is a folder, not a model file", where=str(path), hint=hint)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError("not a regular file", where=str(path), hint=_ONNX_HINT)
        if status.st_size == 0:
            raise ModelError("the file is empty", where=str(path), hint="was its writing interrupted?")
        if status.st_size >= 1 << 31:
            hint = "models of 2 GB and more keep their weights in external data"
            raise ModelError("the file is larger than 2 GB", where=str(path), hint=hint)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise ModelError(f"cannot read the model: {error.strerror}", where=str(path)) from error
    finally:
        os.close(handle)


def _not_onnx(path: Path, data: bytes) -> ModelError:
    """Return the most helpful error for bytes that do not parse."""
    for magic, kind, hint in _MAGIC:
        if data.startswith(magic):
            return ModelError(f"not an ONNX model but {kind}", where=str(path), hint=hint)
    if data[4:8] == b"ORTM":
        hint = "convert from the .onnx file it was made of"
        return ModelError("not an ONNX model but an ONNX Runtime .ort file", where=str(path), hint=hint)
    if all(byte in b"\t\n\r\f" or byte >= 32 for byte in data[:512]):
        return ModelError("not an ONNX model but a text file", where=str(path), hint=_ONNX_HINT)
    return ModelError(
        "not an ONNX model, or truncated", where=str(path), hint="fetch or export the file again"
    )


def _converted(convert: Callable[[Any], Any], value: Any, path: Path) -> Any:
    """Convert by onnx_ir, which reports a malformed graph by whatever it stumbles over.

    Raises:
        ModelError: with what it stumbled over.
    """
    try:
        return convert(value)
    except Exception as error:
        what = f"not a valid ONNX model: {_cause(error)}"
        raise ModelError(what, where=str(path), hint="fetch or export the file again") from error


def _cause(error: BaseException) -> str:
    """Return the first line of what onnx_ir's nested errors started with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for tensor in _initializers(model).values():
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor
    for node in itertools.chain(*model.graphs(), *model.functions.values()):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                yield attribute.value


def keeps_weights_outside(model: ir.Model) -> bool:
    """Return whether a model has so much external data that what is made of it should have some too."""
    return sum(tensor.nbytes for tensor in _external_tensors(model)) >= STREAMED_FROM_BYTES


def _tensor_bytes(model: ir.Model) -> int:
    """Return the bytes that all initializers take, each counted once."""
    tensors = {id(tensor): tensor for tensor in _initializers(model).values()}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype != ir.DataType.STRING)


def _initializers(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return {value: value.const_value for value in values if value.const_value is not None}


def _inline_initializers(model: ir.Model) -> None:
    for value, tensor in _initializers(model).items():
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = in_memory(tensor)


def _inline_attributes(model: ir.Model) -> None:
    """Bring tensors of attributes into the model: nothing maps them, and their place would be stale."""
    for scope in (*model.graphs(), *model.functions.values()):
        for node in scope:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(
                    attribute.value, ir.ExternalTensor
                ):
                    node.attributes[name] = ir.AttrTensor(name, in_memory(attribute.value))


def _write_tensors(model: ir.Model, destination: Path) -> None:
    """Stream the initializers into one file and point the model's values at it."""
    offset = 0
    with whole_file(destination) as temporary, temporary.open("wb") as file:
        for value, tensor in _initializers(model).items():
            if tensor.dtype == ir.DataType.STRING or tensor.nbytes < _EXTERNAL_FROM_BYTES:
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = in_memory(tensor)
                continue
            offset += file.write(b"\0" * (-offset % _ALIGN_BYTES))
            written = stream(tensor, file)
            value.const_value = ir.ExternalTensor(
                destination.name,
                offset,
                written,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=destination.parent,
            )
            offset += written


def _serialized(proto: onnx.ModelProto, path: Path) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (ValueError, google.protobuf.message.EncodeError) as error:
        raise OutputError(f"the model cannot be written: {first_line(error)}", where=str(path)) from error


def _free_name(path: Path) -> Path:
    """Return the first name for external data beside `path` that no file has."""
    names = itertools.chain([f"{path.name}.data"], (f"{path.name}.{i}.data" for i in itertools.count(1)))
    return next(place for name in names if not os.path.lexists(place := path.with_name(name)))


def _own_data_files(path: Path) -> set[Path]:
    """Return the data files of the model now at `path` that were named after it."""
    return {
        file
        for file in _data_files(path)
        if re.fullmatch(re.escape(path.name) + r"(\.\d+)?\.data", file.name)
    }


def _data_files(path: Path) -> set[Path]:
    """Return the external data files of a model; empty when there is no readable model."""
    proto = onnx.ModelProto()
    # Whatever lies there is about to be replaced, or was read before.
    with contextlib.suppress(ModelError, google.protobuf.message.DecodeError):
        proto.ParseFromString(_read_bytes(path))
    entries = (entry for tensor in proto.graph.initializer for entry in tensor.external_data)
    return {path.absolute().parent / entry.value for entry in entries if entry.key == "location"}


def _run_checker(path: str, *, full: bool) -> None:
    try:
        onnx.checker.check_model(path, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"not a valid ONNX model: {first_line(error)}", where=path) from error
