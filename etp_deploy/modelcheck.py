"""What a parsed model must satisfy before anything else looks at it.

These are the defects that `onnx.load` and ONNX Runtime let pass (an unset opset, duplicate initializers) or
that would make a later stage read a file it must not (external data outside the model's folder).
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx

from etp_deploy.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_EXTERNAL_HINT = "external data must lie in the model's own folder"
_DAMAGED_HINT = "the file is damaged or was saved without its weights; fetch or export it again"
# a network of a hundred thousand nodes is large; what unfolds into more than this is no network
_MOST_NODES = 1_000_000
_DEEPEST_CALL = 100
_MAIN_DOMAINS = ("", "ai.onnx")
# Of each data type: the bits of one element, and the typed field that may hold it instead of raw bytes, with
# the elements that one entry of that field makes up. Text has no fixed size.
_LAYOUT: dict[str, tuple[int | None, str, Fraction]] = {
    "FLOAT": (32, "float_data", Fraction(1)),
    "DOUBLE": (64, "double_data", Fraction(1)),
    "INT64": (64, "int64_data", Fraction(1)),
    "UINT64": (64, "uint64_data", Fraction(1)),
    "UINT32": (32, "uint64_data", Fraction(1)),
    "INT32": (32, "int32_data", Fraction(1)),
    "STRING": (None, "string_data", Fraction(1)),
    "COMPLEX64": (64, "float_data", Fraction(1, 2)),
    "COMPLEX128": (128, "double_data", Fraction(1, 2)),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), (16, "int32_data", Fraction(1))),
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), (8, "int32_data", Fraction(1))),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2"), (8, "int32_data", Fraction(1))),
    **dict.fromkeys(("FLOAT8E5M2FNUZ", "FLOAT8E8M0"), (8, "int32_data", Fraction(1))),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), (4, "int32_data", Fraction(2))),
    **dict.fromkeys(("INT2", "UINT2"), (2, "int32_data", Fraction(4))),
}


def check_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a model that is incomplete or whose tensors do not hold what they declare.

    Args:
        proto: the parsed model.
        path: its file; external data is looked for in its folder.

    Raises:
        ModelError: naming the file, the tensor and what is wrong with it.
    """
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(
            "not an ONNX model: it has no graph", where=str(path), hint="an ONNX model file is expected"
        )
    if proto.ir_version <= 0:
        raise ModelError(
            "the model does not say which IR version it uses", where=str(path), hint="export it again"
        )
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    main = [versions[domain] for domain in _MAIN_DOMAINS if domain in versions]
    needs_main = any(node.domain in _MAIN_DOMAINS for node in proto.graph.node)
    if not versions or (needs_main and not main) or any(version <= 0 for version in versions.values()):
        raise ModelError(
            "the model does not say which opset it uses", where=str(path), hint="export it again"
        )
    if any(not node.op_type for node in proto.graph.node):
        raise ModelError("a node has no operator", where=str(path), hint=_DAMAGED_HINT)
    _check_functions(proto, path)
    files: dict[str, int] = {}
    for graph in _graphs(proto):
        _check_names(graph, path)
        for tensor in graph.initializer:
            _check_tensor(tensor, path, files)
    _check_values(proto, path)
    for attribute in _attributes(proto):
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            _check_tensor(tensor, path, files)


def _check_values(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a name that is defined twice, or read and nowhere defined; subgraphs see the outer names."""
    pending: list[tuple[onnx.GraphProto, frozenset[str]]] = [(proto.graph, frozenset())]
    while pending:
        graph, outer = pending.pop()
        given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        made = [name for node in graph.node for name in node.output if name]
        twice = [name for name, count in Counter(made).items() if count > 1 or name in given]
        if twice:
            raise ModelError(f"value {twice[0]!r} is defined twice", where=str(path), hint=_DAMAGED_HINT)
        known = outer.union(given, made)
        read = [name for node in graph.node for name in node.input if name]
        unknown = [name for name in (*read, *(value.name for value in graph.output)) if name not in known]
        if unknown:
            raise ModelError(f"nothing defines value {unknown[0]!r}", where=str(path), hint=_DAMAGED_HINT)
        for node in graph.node:
            for attribute in node.attribute:
                inner = (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))
                pending.extend((subgraph, known) for subgraph in inner)


def _check_names(graph: onnx.GraphProto, path: Path) -> None:
    """Refuse initializers without a name of their own, and the kind that the in-memory graph cannot hold."""
    seen: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name:
            raise ModelError("an initializer has no name", where=str(path), hint="export it again")
        if tensor.name in seen:
            raise ModelError(
                f"two initializers are called {tensor.name!r}", where=str(path), hint="export it again"
            )
        seen.add(tensor.name)
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        hint = "store the tensor dense"
        raise ModelError(f"sparse initializers are not supported ({name!r})", where=str(path), hint=hint)


def _check_tensor(tensor: onnx.TensorProto, path: Path, files: dict[str, int]) -> None:
    """Refuse a tensor whose data is not as long as its shape says, wherever it lies."""
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(
            f"tensor {tensor.name!r} has a negative dimension", where=str(path), hint="export it again"
        )
    if not _type_name(tensor.data_type):
        what = f"tensor {tensor.name!r} has the unknown type {tensor.data_type}"
        raise ModelError(what, where=str(path), hint="is it from a later version of ONNX?")
    bits, field, per_entry = _LAYOUT.get(_type_name(tensor.data_type), (None, "", Fraction(1)))
    count = math.prod(tensor.dims)
    expected = None if bits is None else (count * bits + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, path, files, expected)
    elif tensor.HasField("raw_data"):
        if expected is not None and len(tensor.raw_data) != expected:
            what = (
                f"tensor {tensor.name!r} holds {len(tensor.raw_data)} bytes where its shape needs {expected}"
            )
            raise ModelError(what, where=str(path), hint=_DAMAGED_HINT)
    elif field and len(getattr(tensor, field)) != math.ceil(count / per_entry):
        held = len(getattr(tensor, field))
        what = f"tensor {tensor.name!r} holds {held} entries where its shape needs {count}"
        raise ModelError(what, where=str(path), hint=_DAMAGED_HINT)


def _type_name(data_type: int) -> str:
    """Return the name of a tensor's data type; empty when there is none of this number."""
    known = data_type and data_type in onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(data_type)) if known else ""


def _check_external(
    tensor: onnx.TensorProto, path: Path, files: dict[str, int], expected: int | None
) -> None:
    """Refuse external data that is missing, too short, or not a regular file in the model's folder.

    Args:
        tensor: the tensor that says where its data lies.
        path: the model's file.
        files: sizes in bytes of the data files seen so far, by location; added to.
        expected: bytes that the tensor's shape needs, None where that is not known.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or -1)
    except ValueError:
        offset = length = -2
    if offset < 0 or length < -1:
        what = f"external data of tensor {tensor.name!r} has no valid offset and length"
        raise ModelError(what, where=str(path), hint="export it again")
    if location not in files:
        files[location] = _external_size(location, tensor.name, path)
    if expected is not None and length not in (-1, expected):
        what = f"external data of tensor {tensor.name!r} is {length} bytes where its shape needs {expected}"
        raise ModelError(what, where=str(path), hint=_DAMAGED_HINT)
    needed = offset + max(length, expected or 0)
    if files[location] < needed:
        what = f"external data {location!r} is truncated: {files[location]} bytes where {needed} are needed"
        raise ModelError(what, where=str(path), hint="copy the data file again")


def _external_size(location: str, name: str, path: Path) -> int:
    """Return the bytes of a data file, after making sure that it is one of the model's own."""
    forms = (PurePosixPath(location), PureWindowsPath(location))
    outside = any(form.is_absolute() or form.drive or form.root or ".." in form.parts for form in forms)
    if not location or "\0" in location or outside:
        what = f"tensor {name!r} wants external data at {location!r}"
        raise ModelError(what, where=str(path), hint=_EXTERNAL_HINT)
    folder = Path(os.path.realpath(path.absolute().parent))
    try:
        file = Path(os.path.realpath(folder / location))
        status = file.stat()
    except OSError as error:
        what = f"external data {location!r} of tensor {name!r} cannot be read: {error.strerror}"
        raise ModelError(what, where=str(path), hint="copy it beside the model") from error
    if not file.is_relative_to(folder):
        what = f"external data {location!r} is a link to a place outside the model's folder"
        raise ModelError(what, where=str(path), hint=_EXTERNAL_HINT)
    if not stat.S_ISREG(status.st_mode):
        what = f"external data {location!r} is not a regular file"
        raise ModelError(what, where=str(path), hint=_EXTERNAL_HINT)
    if status.st_nlink > 1:
        what = f"external data {location!r} is a hard link"
        raise ModelError(what, where=str(path), hint="replace it by a copy; it may be a file from elsewhere")
    return status.st_size


def _check_functions(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse local functions that call themselves, or that unfold into more nodes than can be worked with."""
    functions = {(item.domain, item.name, item.overload): item for item in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Sequence[onnx.NodeProto], above: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in _all_nodes(nodes):
            key = (node.domain, node.op_type, node.overload)
            if key not in functions:
                total += 1
                continue
            if key in above or len(above) > _DEEPEST_CALL:
                how = "calls itself" if key in above else f"lies below {_DEEPEST_CALL} others"
                raise ModelError(f"a function {how}", where=f"{path}, function {node.op_type!r}")
            if key not in sizes:
                sizes[key] = size(functions[key].node, (*above, key))
            total += sizes[key]
        return total

    if functions and size(proto.graph.node, ()) > _MOST_NODES:
        raise ModelError(
            f"its functions unfold into more than {_MOST_NODES} nodes",
            where=str(path),
            hint="functions that call each other multiply; inline or simplify them in the exporter",
        )


def _all_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes and those in their bodies."""
    pending = [nodes]
    while pending:
        for node in pending.pop():
            yield node
            for attribute in node.attribute:
                pending.extend(graph.node for graph in attribute.graphs)
                if attribute.HasField("g"):
                    pending.append(attribute.g.node)


def _attributes(proto: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """Yield the attributes of every node, those in subgraphs and functions included."""
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in _all_nodes(nodes):
            yield from node.attribute


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for attribute in _attributes(proto):
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g
