"""Steps of random graphs that treat each entry or each channel by itself, or let tensors meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

if TYPE_CHECKING:
    from graphs import Builder

SMOOTH = (
    "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Selu", "Softplus", "Softsign", "HardSigmoid", "Erf", "Neg", "Abs",
    "Sin", "Cos", "Exp", "Celu", "Identity", "Atan", "Sinh", "Cosh", "ThresholdedRelu",
)  # fmt: skip
LATER = {14: ("HardSwish",), 18: ("Mish",), 20: ("Gelu",)}
STEPPED = ("Floor", "Ceil", "Round", "Sign")


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
