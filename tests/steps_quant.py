"""Quantised steps: weights and activations behind DequantizeLinear, operators on integers, packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder

MICROSOFT = "com.microsoft"
BLOCKED_OPSET = 21


# pieces


def scalar(b: Builder, value: float) -> str:
    """Add a scale."""
    return b.initializer(np.array(value, np.float32), "k")


def zero(b: Builder, dtype: type, *entries: int) -> str:
    """Add a zero point."""
    return b.initializer(np.array(entries if len(entries) > 1 else entries[0], dtype), "k")


def quantized(b: Builder, name: str) -> tuple[str | None, str, str]:
    """Quantise a tensor by the range that it has; return it with scale and zero point."""
    array, signed = b.values[name], b.choose.chance(0.3)
    low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.1)
    scale = (high - low) / 255
    point = int(np.rint(-low / scale)) - (128 if signed else 0)
    names = scalar(b, scale), zero(b, np.int8 if signed else np.uint8, point)
    return b.emit("QuantizeLinear", [name, *names]), *names


def output(b: Builder, largest: float, dtype: type) -> list[str]:
    """Add a scale and a zero point for an operator's result."""
    unsigned = dtype is np.uint8
    return [scalar(b, 2 * largest / 255), zero(b, dtype, b.choose.integer(100, 140) if unsigned else 3)]


def integers(
    b: Builder, shape: tuple[int, ...], out: int, column: int | None, dtype: type, *, by_channel: bool
) -> tuple[str, str, str, np.ndarray]:
    """Add a weight with dead rows and columns, its scale and zero point; return them with the scale's entries."""
    limits = np.iinfo(dtype)
    count = shape[out] if by_channel else 1
    points = b.random.integers(120, 136, count) if dtype is np.uint8 else np.zeros(count, np.int64)
    along = [1] * len(shape)
    along[out] = -1
    centre = np.broadcast_to(points.reshape(along) if by_channel else points.reshape(()), shape)
    array = np.clip(centre + b.random.integers(-90, 91, shape), limits.min, limits.max)
    for axis, share in ((out, 0.6), (column, 0.4)):
        if axis is not None and b.choose.chance(share):
            where = (slice(None),) * axis + (b.dead(shape[axis]),)
            array[where] = centre[where]
    fan = max(int(np.prod(shape)) // shape[out], 1)
    scales = ((0.5 + b.random.random(count)) / (60 * np.sqrt(fan))).astype(np.float32)
    shaped = scales if by_channel else scales.reshape(())
    point = (
        zero(b, dtype, *points.tolist())
        if count > 1
        else b.initializer(points.reshape(shaped.shape).astype(dtype), "k")
    )
    return b.initializer(array.astype(dtype), "q"), b.initializer(shaped, "k"), point, scales


def sums(b: Builder, data_scale: str, scales: np.ndarray, size: int) -> tuple[str, np.ndarray]:
    """Add a bias in units of the data's scale times the weight's; return it with the units."""
    units = np.broadcast_to(float(b.values[data_scale]) * scales.astype(np.float64), size)
    return b.initializer(np.rint(b.vector(size) / units).astype(np.int32), "q"), units


def dequantized(b: Builder, name: str | None, scale: str, point: str) -> bool:
    """Bring a result back into floating point for what comes next."""
    return name is not None and b.add(b.emit("DequantizeLinear", [name, scale, point]))


# steps


def qdq(b: Builder) -> bool:
    """An activation that is quantised and dequantised, sometimes with a scale for each channel."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    if b.choose.chance(0.3):
        # the runtime takes a scale by channel for one by tensor where it fuses: keep a distance
        x = b.emit("Abs", [x]) or x
        size = b.shape(x)[1]
        scales = b.initializer((0.02 + 0.05 * b.random.random(size)).astype(np.float32), "k")
        points = b.initializer(b.random.integers(100, 150, size).astype(np.uint8), "k")
        q = b.emit("QuantizeLinear", [x, scales, points], axis=1)
        return q is not None and b.add(b.emit("DequantizeLinear", [q, scales, points], axis=1))
    q, scale, point = quantized(b, x)
    return dequantized(b, q, scale, point)


def qdq_convolution(b: Builder) -> bool:
    """A Conv whose data, weight and bias come from DequantizeLinear."""
    x = b.pick(3, 4)
    if x is None:
        return False
    q, scale, point = quantized(b, x)
    data = None if q is None else b.emit("DequantizeLinear", [q, scale, point])
    if data is None:
        return False
    channels, spatial = b.shape(x)[1], b.rank(x) - 2
    depthwise = b.choose.chance(0.25)
    out = channels if depthwise else b.choose.one_of((4, 6, 8))
    shape = (out, 1 if depthwise else channels, *[b.choose.one_of((1, 3))] * spatial)
    dtype = b.choose.one_of((np.int8, np.uint8))
    by_channel = b.choose.chance(0.5)
    w, scales, points, factors = integers(b, shape, 0, None if depthwise else 1, dtype, by_channel=by_channel)
    weight = b.emit("DequantizeLinear", [w, scales, points], **({"axis": 0} if by_channel else {}))
    if weight is None:
        return False
    inputs = [data, weight]
    if b.choose.chance(0.7):
        bias, units = sums(b, scale, factors, out)
        made = b.emit("DequantizeLinear", [bias, b.initializer(units.astype(np.float32), "k")], axis=0)
        if made is None:
            return False
        inputs.append(made)
    pads = [b.choose.integer(0, 1)] * (2 * spatial)
    y = b.emit("Conv", inputs, group=channels if depthwise else 1, pads=pads)
    if y is None or b.choose.chance(0.4):
        return b.add(y)
    return dequantized(b, *quantized(b, y))


def qdq_matmul(b: Builder) -> bool:
    """A MatMul or Gemm whose weight is dequantised: by tensor, by channel or by block, sometimes transposed."""
    x = b.pick(2, 3)
    if x is None:
        return False
    size, width = b.shape(x)[-1], b.choose.one_of((4, 6, 8))
    flipped = b.choose.chance(0.3)
    shape, out = ((width, size), 0) if flipped else ((size, width), 1)
    kind = b.choose.one_of(("tensor", "channel", "channel", "block"))
    dtype = b.choose.one_of((np.int8, np.uint8))
    w, scales, points, _ = integers(b, shape, out, 1 - out, dtype, by_channel=kind == "channel")
    attributes = {"axis": out} if kind == "channel" else {}
    if kind == "block" and b.opset >= BLOCKED_OPSET and size % 2 == 0:
        blocks = list(shape)
        blocks[1 - out] //= 2
        scales = b.initializer(0.001 + 0.01 * b.random.random(blocks).astype(np.float32), "k")
        points = b.initializer(np.full(blocks, b.values[points].reshape(-1)[0], dtype), "k")
        attributes = {"axis": 1 - out, "block_size": 2}
    weight = b.emit("DequantizeLinear", [w, scales, points], **attributes)
    if weight is None:
        return False
    if b.rank(x) == 2 and b.choose.chance(0.5):
        return b.add(b.emit("Gemm", [x, weight, b.initializer(b.vector(width), "b")], transB=int(flipped)))
    turned = b.emit("Transpose", [weight], perm=[1, 0]) if flipped else weight
    made = None if turned is None else b.emit("MatMul", [x, turned])
    return b.add(b.biased(made, b.rank(x) - 1))


def linear_convolution(b: Builder) -> bool:
    """A QLinearConv or a ConvInteger."""
    x = b.pick(4)
    if x is None:
        return False
    q, scale, point = quantized(b, x)
    if q is None:
        return False
    data = b.values[q].dtype.type
    channels, out = b.shape(x)[1], b.choose.one_of((4, 6, 8))
    kernel, pads = b.choose.one_of((1, 3)), [b.choose.integer(0, 1)] * 4
    shape = (out, channels, kernel, kernel)
    by_channel = data is np.uint8 and b.choose.chance(0.5)
    w, scales, points, factors = integers(b, shape, 0, 1, np.int8, by_channel=by_channel)
    if b.choose.chance(0.3):
        y = b.emit("ConvInteger", [q, w, point], pads=pads)
        return y is not None and b.add(b.emit("Mul", [_cast(b, y), scalar(b, 1e-4)]))
    bias, _ = sums(b, scale, factors, out)
    result = output(b, 3.0, data)
    inputs = [q, scale, point, w, scales, points, *result, *([bias] if b.choose.chance(0.7) else [])]
    return dequantized(b, b.emit("QLinearConv", inputs, pads=pads), *result)


def _cast(b: Builder, name: str) -> str:
    return b.emit("Cast", [name], to=1) or name


def linear_product(b: Builder) -> bool:  # noqa: PLR0911 - one for each operator
    """A QLinearMatMul, QGemm, MatMulInteger or MatMulIntegerToFloat."""
    x = b.pick(2, 3)
    if x is None:
        return False
    q, scale, point = quantized(b, x)
    if q is None:
        return False
    data = b.values[q].dtype.type
    size, width = b.shape(x)[-1], b.choose.one_of((4, 6, 8))
    w, scales, points, factors = integers(b, (size, width), 1, 0, np.int8, by_channel=b.choose.chance(0.5))
    kind = b.choose.one_of(("QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat"))
    result = output(b, 3.0, data)
    weight = [w, scales, points]
    if kind == "QLinearMatMul":
        return dequantized(b, b.emit(kind, [q, scale, point, *weight, *result]), *result)
    if kind == "QGemm":
        bias, _ = sums(b, scale, factors, width)
        inputs = [q, scale, point, *weight, bias if b.choose.chance(0.7) else ""]
        if b.choose.chance(0.5):
            return b.add(b.emit(kind, inputs, domain=MICROSOFT))
        return dequantized(b, b.emit(kind, [*inputs, *result], domain=MICROSOFT), *result)
    if kind == "MatMulInteger":
        y = b.emit(kind, [q, w, point, points])
        return y is not None and b.add(b.emit("Mul", [_cast(b, y), scalar(b, 1e-4)]))
    bias_too = [b.initializer(b.vector(width), "b")] if b.choose.chance(0.6) else []
    return b.add(b.emit(kind, [q, w, scale, scales, point, points, *bias_too], domain=MICROSOFT))


def dynamic_product(b: Builder) -> bool:  # noqa: PLR0911 - one for each way to write it
    """What dynamic quantisation writes: the data's scale is computed from its range."""
    x = b.pick(2, 3)
    if x is None:
        return False
    size, width = b.shape(x)[-1], b.choose.one_of((4, 6, 8))
    data = b.emit("Relu", [x]) if b.choose.chance(0.7) else x
    if data is None:
        return False
    w, scales, points, _ = integers(b, (size, width), 1, 0, np.int8, by_channel=b.choose.chance(0.5))
    if b.choose.chance(0.3):
        return b.add(b.emit("DynamicQuantizeMatMul", [data, w, scales, points], domain=MICROSOFT))
    q = b.emit("DynamicQuantizeLinear", [data], outputs=3)
    if q is None:
        return False
    scale, point = b.nodes[-1].output[1:]
    if b.choose.chance(0.3):
        return dequantized(b, q, scale, point)
    if b.choose.chance(0.3):
        return b.add(b.emit("MatMulIntegerToFloat", [q, w, scale, scales, point, points], domain=MICROSOFT))
    y = b.emit("MatMulInteger", [q, w, point, points])
    factor = b.emit("Mul", [scale, scales])
    if y is None or factor is None:
        return False
    made = b.emit("Mul", [_cast(b, y), factor])
    return b.add(b.biased(made, b.rank(x) - 1))


def linear_pointwise(b: Builder) -> bool:
    """ONNX Runtime's quantised additions, activations, means and concatenations."""
    x = b.pick(4)
    if x is None:
        return False
    q, scale, point = quantized(b, x)
    if q is None:
        return False
    data = b.values[q].dtype.type
    result = output(b, 3.0, data)
    kind = b.choose.one_of(("Add", "Mul", "LeakyRelu", "Sigmoid", "GlobalAveragePool", "Concat"))
    if kind in {"LeakyRelu", "Sigmoid", "GlobalAveragePool"}:
        y = b.emit(f"QLinear{kind}", [q, scale, point, *result], domain=MICROSOFT)
        return dequantized(b, y, *result)
    other = next((name for name in b.pool if b.shape(name) == b.shape(x) and name != x), x)
    second, other_scale, other_point = quantized(b, other)
    if second is None or b.values[second].dtype != data:
        return False
    both = [q, scale, point, second, other_scale, other_point]
    if kind == "Concat":
        y = b.emit("QLinearConcat", [*result, *both], domain=MICROSOFT, axis=1)
    else:
        y = b.emit(f"QLinear{kind}", [*both, *result], domain=MICROSOFT)
    return dequantized(b, y, *result)


def packed_product(b: Builder) -> bool:
    """A MatMulNBits."""
    x = b.pick(2, 3)
    if x is None:
        return False
    size, width, block = b.shape(x)[-1], b.choose.one_of((4, 6, 8)), 16
    blocks = -(-size // block)
    entries = b.random.integers(0, 256, (width, blocks, block // 2)).astype(np.uint8)
    entries[b.dead(width)] = 0x88
    scales = (0.02 + 0.05 * b.random.random(width * blocks)).astype(np.float32)
    inputs = [x, b.initializer(entries, "q"), b.initializer(scales, "k")]
    attributes = {"K": size, "N": width, "bits": 4, "block_size": block}
    return b.add(b.emit("MatMulNBits", inputs, domain=MICROSOFT, **attributes))


def double(b: Builder) -> bool:
    """A stretch in double precision."""
    x = b.pick(2, 3)
    wide = None if x is None else b.emit("Cast", [x], to=11)
    if x is None or wide is None:
        return False
    weight = b.values[b.weight((b.shape(x)[-1], 6), b.shape(x)[-1], out=1, column=0)].astype(np.float64)
    made = b.emit("MatMul", [wide, b.initializer(weight, "q")])
    moved = (
        None if made is None else b.emit("Add", [made, b.initializer(b.vector(6).astype(np.float64), "q")])
    )
    active = None if moved is None else b.emit(b.choose.one_of(("Relu", "Tanh", "Sigmoid")), [moved])
    return active is not None and b.add(b.emit("Cast", [active], to=1))


STEPS = (
    qdq,
    qdq_convolution,
    qdq_convolution,
    qdq_matmul,
    qdq_matmul,
    linear_convolution,
    linear_product,
    linear_product,
    dynamic_product,
    linear_pointwise,
    packed_product,
    double,
)
