"""Attention blocks in every form in which an operator can hold one, at any widths: planted ones and native ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from graphs import Case, opsets
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"
WIDTH, TOKENS, OTHERS = 10, 5, 7
FORMS = (
    *("decomposed", "standard3", "standard4", "multihead", "multihead-bias", "multihead-keys"),
    *(
        "projecting",
        "projecting-plain",
        "grouped",
        "grouped-packed",
        "grouped-rotary",
        "rotary",
        "rotary-microsoft",
    ),
)
"""One for each operator and each way of handing it queries, keys and values."""
SHARING = ("standard3", "standard4", "grouped", "grouped-packed", "grouped-rotary", "decomposed")
"""The forms in which several query heads may share a key and value head."""


@dataclass(frozen=True)
class Widths:
    """Key and value heads, query heads of each, and the sizes of their heads."""

    groups: int = 4
    per_group: int = 1
    size: int = 8
    value_size: int = 8

    @property
    def heads(self) -> int:
        """All query heads."""
        return self.groups * self.per_group


@dataclass
class Block:
    """Weights of a block as (input, head, index) and (head, index, output), in which tests plant dead structure."""

    widths: Widths
    cross: bool = False
    biased: bool = True
    w: dict[str, np.ndarray] = field(default_factory=dict)
    b: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random, w = np.random.default_rng(7), self.widths
        for name, heads, size in (
            ("q", w.heads, w.size),
            ("k", w.groups, w.size),
            ("v", w.groups, w.value_size),
        ):
            self.w[name] = random.standard_normal((WIDTH, heads, size)).astype(np.float32) / np.float32(3)
            self.b[name] = random.standard_normal((heads, size)).astype(np.float32)
        self.w["o"] = random.standard_normal((w.heads, w.value_size, WIDTH)).astype(np.float32)
        self.b["o"] = random.standard_normal(WIDTH).astype(np.float32)


class Writer:
    """A graph under construction around a block."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def emit(self, operator: str, inputs: list, outputs: int = 1, domain: str = "", **attributes) -> str:
        """Add a node; arrays among its inputs become initializers; return its first output."""
        names = []
        for item in inputs:
            if isinstance(item, np.ndarray):
                names.append(f"w{len(self.weights)}")
                self.weights[names[-1]] = item
            else:
                names.append(item)
        made = [f"t{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(operator, names, made, domain=domain, **attributes))
        return made[0]

    def flat(self, name: str) -> np.ndarray:
        """A projection's weight as a matrix."""
        array = self.block.w[name]
        return array.reshape(array.shape[0] if name != "o" else -1, -1 if name != "o" else WIDTH)

    def linear(self, source: str, name: str, *, bias: bool = True) -> str:
        """Project."""
        made = self.emit("MatMul", [source, self.flat(name)])
        return self.emit("Add", [made, self.block.b[name].reshape(-1)]) if bias else made

    def by_head(
        self, name: str, length: int, heads: int, size: int, perm: tuple[int, ...] = (0, 2, 1, 3)
    ) -> str:
        """Open the heads."""
        split = self.emit("Reshape", [name, np.array([0, length, heads, size])])
        return self.emit("Transpose", [split], perm=perm)

    def merged(self, name: str, width: int) -> str:
        """Close the heads."""
        moved = self.emit("Transpose", [name], perm=[0, 2, 1, 3])
        return self.emit("Reshape", [moved, np.array([0, TOKENS, width])])


def case(form: str, block: Block, mask: np.ndarray | None = None) -> Case:
    """Return a block in a form, and inputs for it."""
    made = Writer(block)
    other = "y" if block.cross else "x"
    heads = _attention(form, made, other, mask)
    out = made.linear(heads, "o", bias=block.biased)
    lengths = {"x": TOKENS, "y": OTHERS} if block.cross else {"x": TOKENS}
    graph = helper.make_graph(
        made.nodes,
        form,
        [
            helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", t, WIDTH])
            for n, t in lengths.items()
        ],
        [helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in made.weights.items()],
    )
    model = helper.make_model(graph, opset_imports=opsets(23), ir_version=10)
    random = np.random.default_rng(1)
    return Case(
        model, {n: random.standard_normal((2, t, WIDTH)).astype(np.float32) for n, t in lengths.items()}
    )


def _attention(form: str, made: Writer, other: str, mask: np.ndarray | None) -> str:
    block, w = made.block, made.block.widths
    family, _, variant = form.partition("-")
    keys = OTHERS if block.cross else TOKENS
    if family == "projecting":
        weight = np.concatenate([made.flat(name) for name in "qkv"], axis=1)
        bias = np.concatenate([block.b[name].reshape(-1) for name in "qkv"]) if variant != "plain" else ""
        sizes = [w.heads * w.size, w.heads * w.size, w.heads * w.value_size]
        given = [] if mask is None else ["", "", mask]
        inputs = ["x", weight, bias, *given]
        return made.emit("Attention", inputs, domain=MICROSOFT, num_heads=w.heads, qkv_hidden_sizes=sizes)
    bias = variant != "bias"
    q = made.linear("x", "q", bias=bias)
    k, v = made.linear(other, "k", bias=bias), made.linear(other, "v", bias=bias)
    if family == "grouped":
        return _grouped(made, variant, (q, k, v))
    if family == "rotary":
        q, k = (_rotated(made, variant, part, w.heads) for part in (q, k))
    if family in {"standard3", "rotary"}:
        given = [q, k, v] if mask is None else [q, k, v, mask]
        return made.emit("Attention", given, q_num_heads=w.heads, kv_num_heads=w.groups)
    if family == "multihead":
        if variant == "keys":
            k, v = made.by_head(k, keys, w.groups, w.size), made.by_head(v, keys, w.groups, w.value_size)
        joint = np.concatenate([block.b[name].reshape(-1) for name in "qkv"]) if variant == "bias" else ""
        given = [] if mask is None else ["", mask]
        return made.emit("MultiHeadAttention", [q, k, v, joint, *given], domain=MICROSOFT, num_heads=w.heads)
    q, v = made.by_head(q, TOKENS, w.heads, w.size), made.by_head(v, keys, w.groups, w.value_size)
    if family == "standard4":
        k = made.by_head(k, keys, w.groups, w.size)
        return made.merged(
            made.emit("Attention", [q, k, v, *([] if mask is None else [mask])]), w.heads * w.value_size
        )
    k = made.by_head(k, keys, w.groups, w.size)
    return made.merged(_decomposed(made, (q, k, v), keys, mask), w.heads * w.value_size)


def _decomposed(made: Writer, parts: tuple[str, str, str], keys: int, mask: np.ndarray | None) -> str:
    """Products and a softmax; shared keys and values are repeated as exporters write it."""
    w, (q, k, v) = made.block.widths, parts
    if w.per_group > 1:
        k, v = (_repeated(made, part, keys, size) for part, size in ((k, w.size), (v, w.value_size)))
    scores = made.emit("MatMul", [q, made.emit("Transpose", [k], perm=[0, 1, 3, 2])])
    scores = made.emit("Mul", [scores, np.array(w.size**-0.5, np.float32)])
    if mask is not None:
        scores = made.emit("Add", [scores, mask])
    return made.emit("MatMul", [made.emit("Softmax", [scores], axis=-1), v])


def _repeated(made: Writer, part: str, keys: int, size: int) -> str:
    w = made.block.widths
    opened = made.emit("Unsqueeze", [part, np.array([2])])
    copies = made.emit("Expand", [opened, np.array([1, w.groups, w.per_group, keys, size])])
    return made.emit("Reshape", [copies, np.array([-1, w.heads, keys, size])])


def _grouped(made: Writer, variant: str, parts: tuple[str, str, str]) -> str:
    w = made.block.widths
    tail = ["", "", np.full(2, TOKENS - 1, np.int32), np.array(TOKENS, np.int32)]
    attributes = {"num_heads": w.heads, "kv_num_heads": w.groups}
    if variant == "rotary":
        tail += list(_tables(w.size // 2))
        attributes["do_rotary"] = 1
    first = [made.emit("Concat", list(parts), axis=2), "", ""] if variant == "packed" else list(parts)
    return made.emit("GroupQueryAttention", [*first, *tail], domain=MICROSOFT, **attributes)


def _tables(half: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(8, dtype=np.float32)[:, None] / np.arange(1, half + 1, dtype=np.float32)
    return np.cos(angles), np.sin(angles)


def _rotated(made: Writer, variant: str, part: str, heads: int) -> str:
    """Rotate half of each head, by either operator."""
    size = made.block.widths.size
    places, tables = np.tile(np.arange(TOKENS), (2, 1)), _tables(size // 4)
    attributes = {"num_heads": heads, "rotary_embedding_dim": size // 2}
    if variant == "microsoft":
        return made.emit(
            "RotaryEmbedding", [part, places, *tables], domain=MICROSOFT, interleaved=1, **attributes
        )
    return made.emit("RotaryEmbedding", [part, *tables, places], **attributes)
