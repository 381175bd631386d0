"""What exporters and optimizers leave behind in a model, taken out of what is deployed."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import onnx

if TYPE_CHECKING:
    from collections.abc import Iterator

# What exporters and optimizers write about themselves into nodes and values.
_BOOKKEEPING = ("pkg.torch", "pkg.onnxscript", "pkg.onnx_ir", "namespace", "onnxsim")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/\\])(?:/(?:[\w.+@-]+/)+|[A-Za-z]:[\\/]|\\\\\w+\\)[\w.+@-]+")


def strip(proto: onnx.ModelProto) -> None:
    """Remove, in place, what exporters and optimizers wrote about themselves and the author's machine.

    Of nodes, values, tensors and graphs: their bookkeeping entries and any text with an absolute path. Of the
    model: bookkeeping entries, and a description with an absolute path.
    """
    if _ABSOLUTE_PATH.search(proto.doc_string):
        proto.ClearField("doc_string")
    _strip_entries(proto, paths=False)
    for message in _messages(proto):
        if _ABSOLUTE_PATH.search(getattr(message, "doc_string", "")):
            message.ClearField("doc_string")
        if hasattr(message, "metadata_props"):
            _strip_entries(message, paths=True)


def _strip_entries(message: Any, *, paths: bool) -> None:
    kept = [
        entry
        for entry in message.metadata_props
        if not entry.key.startswith(_BOOKKEEPING) and not (paths and _ABSOLUTE_PATH.search(entry.value))
    ]
    if len(kept) != len(message.metadata_props):
        # Copied before the field is cleared: clearing invalidates its entries.
        pairs = [(entry.key, entry.value) for entry in kept]
        message.ClearField("metadata_props")
        for key, value in pairs:
            message.metadata_props.add(key=key, value=value)


def _messages(proto: onnx.ModelProto) -> Iterator[Any]:
    """Yield every graph, function, node, value, attribute and tensor in a model."""
    pending: list[Any] = [proto.graph, *proto.functions]
    while pending:
        scope = pending.pop()
        yield scope
        if isinstance(scope, onnx.GraphProto):
            yield from itertools.chain(scope.input, scope.output, scope.initializer)
        yield from scope.value_info
        for node in scope.node:
            yield node
            for attribute in node.attribute:
                yield attribute
                pending.extend(attribute.graphs)
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                if attribute.HasField("t"):
                    yield attribute.t
