"""The ways in which a random graph grows: each step adds a few nodes that exporters or people write."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
from graphs import Builder, Case, Chooser, DrawnChooser, opsets, read_by, runs
from hypothesis import strategies as st
from onnx import helper, numpy_helper

SMOOTH = (
    "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Selu", "Softplus", "Softsign", "HardSigmoid", "Erf", "Neg", "Abs",
    "Sin", "Cos", "Exp", "Celu", "Identity", "Atan", "Sinh", "Cosh", "ThresholdedRelu",
)  # fmt: skip
LATER = {14: ("HardSwish",), 18: ("Mish",), 20: ("Gelu",)}
STEPPED = ("Floor", "Ceil", "Round", "Sign")


# convolutions


def convolution(b: Builder) -> bool:
    """A Conv of any kind."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    channels, spatial = b.shape(x)[1], b.rank(x) - 2
    groups, out = _groups(b, channels)
    kernel = [b.choose.one_of((1, 3, 3, 2)) for _ in range(spatial)]
    attributes = {"group": groups, "kernel_shape": kernel, **_padding(b, spatial, kernel)}
    if b.choose.chance(0.2):
        attributes["strides"] = [b.choose.integer(1, 2) for _ in range(spatial)]
    if b.choose.chance(0.2) and "auto_pad" not in attributes:
        attributes["dilations"] = [b.choose.integer(1, 2) for _ in range(spatial)]
    fan = channels // groups * int(np.prod(kernel))
    shape = (out, channels // groups, *kernel)
    inputs = [x, b.weight(shape, fan, out=0, column=1)]
    if b.choose.chance(0.6):
        inputs.append(b.initializer(b.vector(out), "b"))
    return b.add(b.emit("Conv", inputs, **attributes))


def transposed_convolution(b: Builder) -> bool:
    """A ConvTranspose."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    channels, spatial = b.shape(x)[1], b.rank(x) - 2
    groups, out = _groups(b, channels)
    kernel = [b.choose.one_of((1, 2, 3)) for _ in range(spatial)]
    attributes = {"group": groups, "kernel_shape": kernel, "strides": [b.choose.integer(1, 2)] * spatial}
    if b.choose.chance(0.3):
        attributes["pads"] = [1] * (2 * spatial)
    fan = channels // groups * int(np.prod(kernel))
    inputs = [x, b.weight((channels, out // groups, *kernel), fan, out=1 if groups == 1 else None, column=0)]
    if b.choose.chance(0.6):
        inputs.append(b.initializer(b.vector(out), "b"))
    return b.add(b.emit("ConvTranspose", inputs, **attributes))


def _groups(b: Builder, channels: int) -> tuple[int, int]:
    kind = b.choose.one_of(("one", "one", "depthwise", "grouped", "multiplied"))
    if kind == "depthwise":
        return channels, channels
    if kind == "multiplied" and channels <= 12:
        return channels, 2 * channels
    divisors = [g for g in (2, 3, 4) if channels % g == 0]
    if kind == "grouped" and divisors:
        groups = b.choose.one_of(divisors)
        return groups, groups * b.choose.integer(1, 5)
    return 1, b.choose.one_of((4, 6, 8, 12, 1))


def _padding(b: Builder, spatial: int, kernel: list[int]) -> dict[str, object]:
    kind = b.choose.one_of(("same", "same", "none", "uneven", "auto"))
    if kind == "same":
        return {"pads": [k // 2 for k in kernel] * 2}
    if kind == "uneven":
        return {"pads": [b.choose.integer(0, 2) for _ in range(2 * spatial)]}
    if kind == "auto":
        return {"auto_pad": b.choose.one_of(("SAME_UPPER", "SAME_LOWER", "VALID"))}
    return {}


def pooling(b: Builder) -> bool:
    """Any pooling."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    spatial = b.rank(x) - 2
    operator = b.choose.one_of(
        (
            "MaxPool",
            "AveragePool",
            "AveragePool",
            "LpPool",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "GlobalLpPool",
        )
    )
    if operator.startswith("Global"):
        return b.add(b.emit(operator, [x]))
    kernel = [b.choose.integer(1, min(3, side)) for side in b.shape(x)[2:]]
    attributes: dict[str, object] = {"kernel_shape": kernel, "strides": [b.choose.integer(1, 2)] * spatial}
    if b.choose.chance(0.5):
        attributes["pads"] = [min(k - 1, b.choose.integer(0, 1)) for k in kernel] * 2
    if operator != "LpPool" and b.choose.chance(0.3):
        attributes["ceil_mode"] = 1
    if operator == "AveragePool" and b.choose.chance(0.5):
        attributes["count_include_pad"] = 1
    return b.add(b.emit(operator, [x], **attributes))


def padding(b: Builder) -> bool:
    """A Pad along space or channels."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    rank = b.rank(x)
    pads = [0, 0, *(b.choose.integer(0, 1) for _ in range(rank - 2))] * 2
    if b.choose.chance(0.25):
        pads[1] = b.choose.integer(0, 2)
    mode = b.choose.one_of(("constant", "constant", "reflect", "edge"))
    inputs = [x, b.ints(*pads)]
    if mode == "constant" and b.choose.chance(0.5):
        inputs.append(b.initializer(np.array(b.choose.one_of((0.0, 0.5)), np.float32), "k"))
    return b.add(b.emit("Pad", inputs, mode=mode))


def resizing(b: Builder) -> bool:
    """A Resize by scales or to sizes."""
    x = b.pick(4)
    if x is None:
        return False
    mode = b.choose.one_of(("nearest", "linear", "cubic"))
    if b.choose.chance(0.5):
        shape = b.shape(x)
        inputs = [x, "", "", b.ints(*shape[:2], *(side * 2 for side in shape[2:]))]
    else:
        inputs = [x, "", b.initializer(np.array([1, 1, 2, 1.5], np.float32), "k")]
    extra = {} if mode == "nearest" else {"coordinate_transformation_mode": "align_corners"}
    return b.add(b.emit("Resize", inputs, mode=mode, **(extra if b.choose.chance(0.3) else {})))


def rearranging(b: Builder) -> bool:
    """DepthToSpace or SpaceToDepth."""
    x = b.pick(4)
    if x is None:
        return False
    if b.choose.chance(0.5):
        return b.add(b.emit("DepthToSpace", [x], blocksize=2, mode=b.choose.one_of(("DCR", "CRD"))))
    return b.add(b.emit("SpaceToDepth", [x], blocksize=2))


# pointwise


def normalisation(b: Builder) -> bool:
    """BatchNormalization and its relatives."""
    x = b.pick(2, 3, 4, 5)
    if x is None:
        return False
    size = b.shape(x)[1]
    kind = b.choose.one_of(("batch", "batch", "batch", "instance", "layer"))
    if kind == "layer" and b.opset >= 17:
        width = b.shape(x)[-1]
        scale, shift = b.initializer(b.vector(width, 0), "s"), b.initializer(b.vector(width, 0), "b")
        return b.add(b.emit("LayerNormalization", [x, scale, shift], axis=-1))
    scale, shift = b.initializer(b.vector(size, 0.4), "s"), b.initializer(b.vector(size), "b")
    if kind == "instance" and b.rank(x) > 2:
        return b.add(b.emit("InstanceNormalization", [x, scale, shift], epsilon=1e-2))
    mean = b.initializer(b.vector(size), "m")
    spread = b.initializer(np.abs(b.vector(size, 0)) + np.float32(0.5), "v")
    return b.add(b.emit("BatchNormalization", [x, scale, shift, mean, spread]))


def activation(b: Builder) -> bool:
    """Any function of one tensor."""
    x = b.pick()
    if x is None:
        return False
    options = [*SMOOTH, *(name for opset, names in LATER.items() if b.opset >= opset for name in names)]
    if b.choose.chance(0.05):
        options = list(STEPPED)
    operator = b.choose.one_of(options)
    attributes = {"approximate": "tanh"} if operator == "Gelu" and b.choose.chance(0.5) else {}
    return b.add(b.emit(operator, [x], **attributes))


def bounded(b: Builder) -> bool:
    """Clip, PRelu or a swish written out."""
    x = b.pick()
    if x is None:
        return False
    kind = b.choose.one_of(("clip", "prelu", "swish", "cast"))
    if kind == "clip":
        low, high = (b.initializer(np.array(v, np.float32), "k") for v in (-0.5, 1.0))
        return b.add(b.emit("Clip", [x, low, high] if b.choose.chance(0.6) else [x, low]))
    if kind == "prelu" and b.rank(x) >= 2:
        shape = [1] * (b.rank(x) - 1)
        shape[0] = b.choose.one_of((1, b.shape(x)[1]))
        slope = b.initializer(b.vector(shape[0]).reshape(shape), "s")
        return b.add(b.emit("PRelu", [x, slope]))
    if kind == "cast":
        half = b.emit("Cast", [x], to=onnx.TensorProto.DOUBLE)
        return half is not None and b.add(b.emit("Cast", [half], to=onnx.TensorProto.FLOAT))
    gate = b.emit("Sigmoid", [x])
    return gate is not None and b.add(b.emit("Mul", [gate, x]))


def with_parameter(b: Builder) -> bool:
    """A tensor and a constant under an operator of two, broadcast in some way."""
    x = b.pick()
    if x is None:
        return False
    shape = b.shape(x)
    operator = b.choose.one_of(("Add", "Mul", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Sum", "Mean"))
    own: tuple[int, ...] = ()
    kind = b.choose.one_of(("scalar", "channel", "channel", "long", "full", "last", "wider"))
    if kind in {"channel", "long"} and len(shape) >= 2:
        own = (shape[1], *([1] * (len(shape) - 2)))
        own = (1, *own) if kind == "long" else own
    elif kind == "full":
        own = shape if not b.dynamic else shape[1:]
    elif kind == "last":
        own = shape[-1:]
    elif kind == "wider" and len(shape) >= 2:
        own = tuple(
            b.choose.integer(2, 4) if size == 1 and axis else size for axis, size in enumerate(shape)
        )[1:]
    array = b.vector(int(np.prod(own, dtype=int))).reshape(own)
    if operator == "Div":
        array = np.abs(array) + np.float32(0.5)
    if operator == "Pow":
        array = np.full(own, 2, np.float32)
    parameter = b.initializer(array, "p")
    swapped = operator in {"Add", "Mul", "Sub", "Max", "Min"} and b.choose.chance(0.4)
    return b.add(b.emit(operator, [parameter, x] if swapped else [x, parameter]))


def meeting(b: Builder) -> bool:
    """Two computed tensors under an operator: a residual, a gate, a maximum; broadcast where shapes allow."""
    x = b.pick()
    if x is None:
        return False
    partners = [name for name in b.pool if _broadcasts(b.shape(name), b.shape(x))]
    y = b.choose.one_of(partners)
    operator = b.choose.one_of(("Add", "Add", "Add", "Mul", "Sub", "Max", "Min", "Sum", "Mean"))
    names = [x, y] if b.choose.chance(0.5) else [y, x]
    if operator in {"Sum", "Mean", "Max"} and b.choose.chance(0.3):
        names.append(b.choose.one_of(partners))
    return b.add(b.emit(operator, names))


def _broadcasts(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(one, other)
    except ValueError:
        return False
    return True


def residual(b: Builder) -> bool:
    """A block of one or two layers with a skip."""
    x = b.pick(3, 4)
    if x is None:
        return False
    size = b.shape(x)[1]
    y: str | None = x
    for _ in range(b.choose.integer(1, 2)):
        if y is None:
            return False
        kernel = [3] * (b.rank(x) - 2)
        inputs = [y, b.weight((size, size, *kernel), size * 3, out=0, column=1)]
        if b.choose.chance(0.5):
            inputs.append(b.initializer(b.vector(size), "b"))
        y = b.emit("Conv", inputs, pads=[1] * (2 * len(kernel)))
        if y is not None and b.choose.chance(0.5):
            y = b.emit("Relu", [y])
    return y is not None and b.add(b.emit("Add", [y, x] if b.choose.chance(0.5) else [x, y]))


def squeeze_and_excite(b: Builder) -> bool:
    """A gate computed from the mean over space."""
    x = b.pick(4)
    if x is None:
        return False
    size = b.shape(x)[1]
    squeezed = b.emit("GlobalAveragePool", [x])
    for width, function in ((4, "Relu"), (size, "Sigmoid")):
        if squeezed is None:
            return False
        own = b.shape(squeezed)[1]
        inputs = [squeezed, b.weight((width, own, 1, 1), own, out=0, column=1)]
        inputs.append(b.initializer(b.vector(width), "b"))
        made = b.emit("Conv", inputs)
        squeezed = None if made is None else b.emit(function, [made])
    return squeezed is not None and b.add(b.emit("Mul", [x, squeezed]))


def choosing(b: Builder) -> bool:
    """Where with a constant or a computed condition."""
    x = b.pick()
    if x is None:
        return False
    other = b.initializer(np.array(0.3, np.float32), "k")
    if b.choose.chance(0.5):
        condition: str | None = b.initializer(b.random.random(b.shape(x)[1:]) > 0.5, "c")
    else:
        condition = b.emit("Greater", [x, b.initializer(np.array(0.01, np.float32), "k")])
    names = [x, other] if b.choose.chance(0.5) else [other, x]
    return condition is not None and b.add(b.emit("Where", [condition, *names]))


# moving


def joining(b: Builder) -> bool:
    """Concat of tensors that fit, along any axis, sometimes with a constant."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    shape = b.shape(x)
    fits = [
        name
        for name in b.pool
        if b.rank(name) == len(shape)
        and all(a == c for d, (a, c) in enumerate(zip(b.shape(name), shape, strict=True)) if d != axis)
    ]
    names = [x] + [b.choose.one_of(fits) for _ in range(b.choose.integer(1, 2))]
    if b.choose.chance(0.2) and not b.dynamic:
        size = (*shape[:axis], 2, *shape[axis + 1 :])
        names.append(b.initializer(b.vector(int(np.prod(size))).reshape(size), "p"))
    return b.add(b.emit("Concat", names, axis=axis if b.choose.chance(0.5) else axis - len(shape)))


def splitting(b: Builder) -> bool:
    """Split along an axis into two or three."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    size = b.shape(x)[axis]
    count = b.choose.integer(2, 3)
    if size < count:
        return False
    if size % count == 0 and b.choose.chance(0.5):
        attributes = {"num_outputs": count} if b.opset >= 18 else {}
        first = b.emit("Split", [x], count, axis=axis, **attributes)
    else:
        cuts = [1] * (count - 1)
        first = b.emit("Split", [x, b.ints(*cuts, size - len(cuts))], count, axis=axis)
    if first is None:
        return False
    names = list(b.nodes[-1].output)
    return b.add(*(names if b.choose.chance(0.7) else names[:1]))


def slicing(b: Builder) -> bool:
    """Slice along one or two axes."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axes = [b.choose.integer(1, b.rank(x) - 1)]
    if b.choose.chance(0.2):
        axes = list(range(1, b.rank(x)))[:2]
    starts = [b.choose.integer(0, b.shape(x)[axis] - 1) for axis in axes]
    ends = [
        b.choose.one_of((2**31, b.shape(x)[axis], start + 2))
        for axis, start in zip(axes, starts, strict=True)
    ]
    inputs = [x, b.ints(*starts), b.ints(*ends), b.ints(*axes)]
    if b.choose.chance(0.3):
        inputs.append(b.ints(*(b.choose.integer(1, 2) for _ in axes)))
    return b.add(b.emit("Slice", inputs))


def gathering(b: Builder) -> bool:
    """Gather along an axis by constant indices: some, all in another order, one, one twice."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    size = b.shape(x)[axis]
    order = b.random.permutation(size)
    kind = b.choose.one_of(("some", "order", "one", "twice", "negative"))
    if kind == "one":
        indices = np.array(int(order[0]), np.int64)
    elif kind == "twice":
        indices = np.array([*order, order[0]], np.int64)
    elif kind == "negative":
        indices = order[: (size + 1) // 2].astype(np.int64) - size
    else:
        indices = order[: size if kind == "order" else (size + 1) // 2].astype(np.int64)
    return b.add(b.emit("Gather", [x, b.initializer(indices, "k")], axis=axis))


def shuffling(b: Builder) -> bool:
    """ShuffleNet's shuffle: Reshape, Transpose, Reshape."""
    x = b.pick(4)
    if x is None:
        return False
    n, size, *space = b.shape(x)
    groups = [g for g in (2, 3, 4) if size % g == 0]
    if not groups:
        return False
    g = b.choose.one_of(groups)
    split = b.emit("Reshape", [x, b.target(n, g, size // g, *space)])
    swapped = None if split is None else b.emit("Transpose", [split], perm=[0, 2, 1, 3, 4])
    return swapped is not None and b.add(b.emit("Reshape", [swapped, b.target(n, size, *space)]))


def reshaping(b: Builder) -> bool:  # noqa: PLR0911 - a list of kinds
    """Merge neighbouring axes, split one, or flatten."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    shape = list(b.shape(x))
    kind = b.choose.one_of(("flatten", "merge", "split", "batch", "unsqueeze", "squeeze"))
    if kind == "flatten":
        return b.add(b.emit("Flatten", [x], axis=1 if b.dynamic else b.choose.integer(0, 2)))
    if kind == "merge" and len(shape) > 2:
        axis = b.choose.integer(1, len(shape) - 2)
        return b.add(
            b.emit("Reshape", [x, b.target(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])])
        )
    if kind == "split" and len(shape) < 5:
        axis = b.choose.integer(1, len(shape) - 1)
        parts = [d for d in (2, 3, 4) if shape[axis] % d == 0]
        if parts:
            part = b.choose.one_of(parts)
            return b.add(
                b.emit("Reshape", [x, b.target(*shape[:axis], part, shape[axis] // part, *shape[axis + 1 :])])
            )
    if kind == "batch" and len(shape) > 2:
        return b.add(b.emit("Reshape", [x, b.target(shape[0] * shape[1], *shape[2:])]))
    if kind == "unsqueeze" and len(shape) < 5:
        return b.add(b.emit("Unsqueeze", [x, b.ints(b.choose.integer(1, len(shape)))]))
    ones = [axis for axis, size in enumerate(shape) if size == 1 and axis]
    return bool(ones) and b.add(b.emit("Squeeze", [x, b.ints(b.choose.one_of(ones))]))


def transposing(b: Builder) -> bool:
    """Transpose any axes but, mostly, the batch."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    rest = [int(axis) + 1 for axis in b.random.permutation(b.rank(x) - 1)]
    perm = [0, *rest]
    if not b.dynamic and b.choose.chance(0.15):
        perm = [int(axis) for axis in b.random.permutation(b.rank(x))]
    return b.add(b.emit("Transpose", [x], perm=perm))


def repeating(b: Builder) -> bool:
    """Expand or Tile."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    shape = b.shape(x)
    if b.choose.chance(0.3):
        return b.add(
            b.emit("Tile", [x, b.ints(*(1 if a == 0 else b.choose.integer(1, 2) for a in range(len(shape))))])
        )
    sizes = [
        1 if axis == 0 else (b.choose.integer(2, 4) if size == 1 else size) for axis, size in enumerate(shape)
    ]
    return b.add(b.emit("Expand", [x, b.ints(*sizes)]))


def reduction(b: Builder) -> bool:
    """A reduction over some axes."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    operator = b.choose.one_of(
        (
            "ReduceMean",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceSum",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
    )
    axes = [axis for axis in range(1, b.rank(x)) if b.choose.chance(0.5)] or [b.rank(x) - 1]
    keepdims = b.choose.integer(0, 1)
    as_input = b.opset >= 18 or operator == "ReduceSum"
    if as_input:
        return b.add(b.emit(operator, [x, b.ints(*axes)], keepdims=keepdims))
    return b.add(b.emit(operator, [x], axes=axes, keepdims=keepdims))


def softmax(b: Builder) -> bool:
    """Softmax along an axis."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    return b.add(
        b.emit(b.choose.one_of(("Softmax", "LogSoftmax")), [x], axis=b.choose.integer(1, b.rank(x) - 1))
    )


# products


def dense(b: Builder) -> bool:
    """MatMul with a weight from the right, or from the left, with a bias or not."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    width = b.choose.one_of((4, 6, 8, 12))
    if b.choose.chance(0.8):
        return b.add(b.linear(x, width))
    size = b.shape(x)[-2]
    if b.rank(x) > 2 or not b.dynamic:
        made = b.emit("MatMul", [b.weight((width, size), size, out=0, column=1), x])
        return b.add(None if made is None else b.biased(made, b.rank(made) - 2))
    return False


def batched(b: Builder) -> bool:
    """MatMul with a weight of more than two axes."""
    x = b.pick(3, 4)
    if x is None:
        return False
    size, batch = b.shape(x)[-1], b.shape(x)[-3] if b.rank(x) == 4 else b.choose.integer(2, 3)
    weight = b.weight((batch, size, 5), size, out=2, column=1)
    if b.rank(x) == 3:
        lifted = b.emit("Unsqueeze", [x, b.ints(1)])
        return lifted is not None and b.add(b.emit("MatMul", [lifted, weight]))
    return b.add(b.emit("MatMul", [x, weight]))


def gemm(b: Builder) -> bool:
    """Gemm in all its forms."""
    x = b.pick(2)
    if x is None:
        flat = b.pick(3, 4)
        x = None if flat is None else b.emit("Flatten", [flat], axis=1)
    if x is None:
        return False
    across = not b.dynamic and b.choose.chance(0.15)
    turned, width = b.choose.chance(0.5), b.choose.one_of((4, 6, 8, 10))
    size = b.shape(x)[0 if across else 1]
    shape = (width, size) if turned else (size, width)
    inputs = [x, b.weight(shape, size, out=0 if turned else 1, column=1 if turned else 0)]
    attributes: dict[str, object] = {"transB": int(turned), "transA": int(across)}
    if b.choose.chance(0.7):
        own = b.choose.one_of(((width,), (width,), (1, width), (), (1,)))
        inputs.append(b.initializer(b.vector(int(np.prod(own, dtype=int))).reshape(own), "b"))
    if b.choose.chance(0.3):
        attributes["alpha"] = 0.5
    if b.choose.chance(0.3):
        attributes["beta"] = b.choose.one_of((2.0, 0.0, -0.5))
    return b.add(b.emit("Gemm", inputs, **attributes))


def attention(b: Builder) -> bool:
    """Attention over the second axis: separate or packed, masked or not, with one or several keys."""
    x = b.pick(3)
    if x is None:
        return False
    n, length, _ = b.shape(x)
    heads, size = b.choose.integer(1, 4), b.choose.integer(1, 3)
    single = heads > 1 and b.choose.chance(0.2)
    counts = (heads, 1 if single else heads, 1 if single else heads)
    parts = _projections(b, x, counts, size)
    if parts is None:
        return False
    q, k, v = (
        _heads(b, part, (n, length, count, size), last)
        for part, count, last in zip(parts, counts, (False, True, False), strict=True)
    )
    if q is None or k is None or v is None:
        return False
    scores = b.emit("MatMul", [q, k])
    if scores is not None:
        scale = b.initializer(np.array(size**0.5, np.float32), "k")
        scores = b.emit(b.choose.one_of(("Div", "Mul")), [scores, scale])
    if scores is not None and b.choose.chance(0.3):
        mask = np.triu(np.full((length, length), -5.0, np.float32), 1)
        scores = b.emit("Add", [scores, b.initializer(mask, "k")])
    if scores is not None and b.choose.chance(0.2):
        scores = b.emit("Add", [scores, b.initializer(b.vector(heads).reshape(1, heads, 1, 1), "p")])
    weights = None if scores is None else b.emit("Softmax", [scores], axis=-1)
    if weights is not None and b.choose.chance(0.15):
        weights = b.emit("Dropout", [weights])
    mixed = None if weights is None else b.emit("MatMul", [weights, v])
    back = None if mixed is None else b.emit("Transpose", [mixed], perm=[0, 2, 1, 3])
    merged = None if back is None else b.emit("Reshape", [back, b.target(n, length, heads * size)])
    if merged is None:
        return False
    out = b.linear(merged, b.shape(x)[-1])
    if out is not None and b.choose.chance(0.5):
        out = b.emit("Add", [out, x])
    return b.add(out)


def _projections(b: Builder, x: str, counts: tuple[int, int, int], size: int) -> list[str] | None:
    widths = [count * size for count in counts]
    if b.choose.chance(0.5):
        parts = [b.linear(x, width) for width in widths]
        return None if any(part is None for part in parts) else [part for part in parts if part is not None]
    packed = b.linear(x, sum(widths))
    if packed is None:
        return None
    first = b.emit("Split", [packed, b.ints(*widths)], 3, axis=2)
    return None if first is None else list(b.nodes[-1].output)


def _heads(b: Builder, name: str, shape: tuple[int, int, int, int], last: bool) -> str | None:
    split = b.emit("Reshape", [name, b.target(*shape)])
    return (
        None if split is None else b.emit("Transpose", [split], perm=[0, 2, 3, 1] if last else [0, 2, 1, 3])
    )


def between(b: Builder) -> bool:
    """MatMul of two computed tensors: a tensor with itself turned, or with what fits."""
    x = b.pick(2, 3, 4)
    if x is None or (b.dynamic and b.rank(x) == 2):
        return False
    rank = b.rank(x)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    turned = b.emit("Transpose", [x], perm=perm)
    if turned is None:
        return False
    partner = [name for name in b.pool if b.rank(name) == rank and b.shape(name)[-2] == b.shape(x)[-1]]
    if partner and b.choose.chance(0.5):
        return b.add(b.emit("MatMul", [x, b.choose.one_of(partner)]))
    return b.add(b.emit("MatMul", [x, turned] if b.choose.chance(0.5) else [turned, x]))


def gated(b: Builder) -> bool:
    """A gated feed-forward layer."""
    x = b.pick(3)
    if x is None:
        return False
    width = b.choose.one_of((6, 8, 12))
    up, gate = b.linear(x, width), b.linear(x, width)
    gate = None if gate is None else b.emit("Sigmoid", [gate])
    joined = None if up is None or gate is None else b.emit("Mul", [gate, up])
    return joined is not None and b.add(b.linear(joined, b.shape(x)[-1]))


def embedding(b: Builder) -> bool:
    """Rows of a table by integer inputs, and a table of positions."""
    if "ids" not in b.inputs or b.dynamic:
        return False
    length, width = b.shape("ids")[1], b.choose.one_of((6, 8, 12))
    table = b.weight((11, width), 4, out=1)
    rows = b.emit("Gather", [table, "ids"])
    if rows is not None and b.choose.chance(0.5):
        rows = b.emit("Add", [rows, b.initializer(b.vector(length * width).reshape(1, length, width), "p")])
    return b.add(rows)


# what has no rule, or few


def unknown(b: Builder) -> bool:  # noqa: PLR0911 - a list of kinds
    """An operator that moves or mixes in ways of its own."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    rank = b.rank(x)
    kind = b.choose.one_of(
        ("cumsum", "einsum", "lrn", "topk", "nonzero", "if", "onehot", "trilu", "argmax", "shape")
    )
    if kind == "cumsum":
        axis = b.initializer(np.array(b.choose.integer(1, rank - 1), np.int64), "k")
        return b.add(b.emit("CumSum", [x, axis]))
    if kind == "einsum" and rank == 3:
        weight = b.weight((b.shape(x)[2], 5), b.shape(x)[2], out=1, column=0)
        return b.add(b.emit("Einsum", [x, weight], equation="bld,de->ble"))
    if kind == "lrn" and rank == 4:
        return b.add(b.emit("LRN", [x], size=3))
    if kind == "topk":
        axis = b.choose.integer(1, rank - 1)
        first = b.emit("TopK", [x, b.ints(b.choose.integer(1, b.shape(x)[axis]))], 2, axis=axis)
        return b.add(first)
    if kind == "if":
        return _branching(b, x)
    if kind == "trilu":
        return b.add(b.emit("Trilu", [x]))
    if kind == "shape":
        sizes = b.emit("Shape", [x])
        return sizes is not None and b.add(b.emit("Cast", [sizes], to=onnx.TensorProto.FLOAT))
    if kind == "argmax":
        places = b.emit("ArgMax", [x], axis=b.choose.integer(1, rank - 1))
        return places is not None and b.add(b.emit("Cast", [places], to=onnx.TensorProto.FLOAT))
    return False


def _branching(b: Builder, x: str) -> bool:
    """An If whose branches read outer tensors."""
    y = b.choose.one_of([name for name in b.pool if b.shape(name) == b.shape(x)])
    condition = b.initializer(np.array(b.choose.chance(0.5)), "c")
    branches = {}
    for key, operator, source in (("then_branch", "Relu", x), ("else_branch", "Neg", y)):
        out = b.name("inner")
        branches[key] = helper.make_graph(
            [helper.make_node(operator, [source], [out])],
            key,
            [],
            [helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, [None] * b.rank(x))],
        )
    return b.add(b.emit("If", [condition], **branches))


STEPS = (
    *(convolution,) * 6,
    *(normalisation,) * 3,
    *(activation,) * 3,
    *(with_parameter,) * 3,
    *(meeting,) * 3,
    *(dense,) * 3,
    *(attention,) * 2,
    *(gemm,) * 2,
    *(pooling,) * 2,
    *(reshaping,) * 2,
    *(transposing,) * 2,
    *(
        transposed_convolution,
        padding,
        resizing,
        rearranging,
        bounded,
        residual,
        squeeze_and_excite,
        choosing,
    ),
    *(
        joining,
        splitting,
        slicing,
        gathering,
        shuffling,
        repeating,
        reduction,
        softmax,
        batched,
        between,
        gated,
    ),
    *(embedding, unknown),
    *(
        step
        for module in sorted(Path(__file__).parent.glob("steps_*.py"))
        for step in import_module(module.stem).STEPS
    ),
)
"""What a graph grows by, as often as it is listed; each file `steps_*.py` beside this one adds its own `STEPS`."""


def grown(choose: Chooser, seed: int) -> Case:
    """Return a random graph with dead structure that ONNX Runtime runs, and an input."""
    while True:
        case = _grown(choose, seed)
        # nodes that run one by one may not run together: the runtime's shape inference differs from its kernels
        if runs(case):
            return case


def _grown(choose: Chooser, seed: int) -> Case:
    b = Builder(choose, seed, choose.integer(13, 23))
    b.dynamic = choose.chance(0.3)
    kind = choose.one_of(("image", "image", "sequence", "vector", "signal", "volume"))
    shape = {
        "image": (2, 3, 6, 5),
        "sequence": (2, 5, 6),
        "vector": (2, 7),
        "signal": (2, 4, 9),
        "volume": (1, 2, 4, 3, 4),
    }[kind]
    _input(b, "x", b.random.standard_normal(shape).astype(np.float32))
    if choose.chance(0.25):
        _input(
            b, "unused" if choose.chance(0.3) else "x2", b.random.standard_normal(shape).astype(np.float32)
        )
    if kind == "sequence":
        _input(b, "ids", b.random.integers(0, 11, (2, 5)))
    wanted = choose.integer(2, 14)
    tries = 0
    while wanted and tries < 60:
        tries += 1
        wanted -= int(choose.one_of(STEPS)(b))
    return _finished(b)


def _input(b: Builder, name: str, array: np.ndarray) -> None:
    b.values[name] = array
    b.inputs[name] = ("N", *array.shape[1:]) if b.dynamic else array.shape
    if array.dtype == np.float32 and name != "unused":
        b.pool.append(name)


def _finished(b: Builder) -> Case:
    """Choose the outputs: what nothing reads, and now and then something in the middle."""
    read = set().union(*(read_by(node) for node in b.nodes))
    made = [name for node in b.nodes for name in node.output if name]
    ends = [name for name in made if name not in read and b.values[name].dtype == np.float32]
    if len(ends) > 2 and b.choose.chance(0.5):
        ends = ends[-2:]
    if made and b.choose.chance(0.15):
        ends.append(b.choose.one_of(made))
    ends = [_read(b, name) for name in dict.fromkeys(ends)]
    outputs = list(dict.fromkeys(ends)) or [b.emit("Identity", ["x"]) or "x"]
    used = set().union(*(read_by(node) for node in b.nodes))
    graph = helper.make_graph(
        b.nodes,
        "random",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(b.values[name].dtype), shape)
            for name, shape in b.inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(b.values[name].dtype), None)
            for name in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in b.initializers.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=opsets(b.opset), ir_version=8)
    return Case(model, {name: b.values[name] for name in b.inputs})


def _read(b: Builder, name: str) -> str:
    """Let a last layer read an end, mostly, so that its channels are none of the model's outputs."""
    if b.rank(name) < 2 or b.choose.chance(0.2):
        return name
    if b.rank(name) in {3, 4} and b.choose.chance(0.6):
        size = b.shape(name)[1]
        weight = b.weight((3, size, *([1] * (b.rank(name) - 2))), size, column=1)
        return b.emit("Conv", [name, weight]) or name
    return b.linear(name, 3) or name


@st.composite
def graphs(draw: st.DrawFn) -> Case:
    """Draw a random graph with dead structure, and an input for it."""
    return grown(DrawnChooser(draw), draw(st.integers(0, 2**20)))
