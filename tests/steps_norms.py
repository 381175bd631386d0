"""Steps of random graphs: normalisations, and what ONNX Runtime's optimiser writes for several operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder

MICROSOFT = "com.microsoft"


def _scale(b: Builder, size: int) -> str:
    return b.initializer(b.vector(size), "s")


def root_mean_square(b: Builder) -> bool:
    """An RMS norm over the last axis (now and then over more), of both names."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    operator = "RMSNormalization" if b.opset >= 23 else "SimplifiedLayerNormalization"
    axis, shape = -1, b.shape(x)
    own = (shape[-1],)
    if b.rank(x) > 2 and b.choose.chance(0.15):
        axis, own = -2, shape[-2:]
    scale = b.initializer(b.vector(int(np.prod(own))).reshape(own), "s")
    return b.add(b.emit(operator, [x, scale], axis=axis, epsilon=b.choose.one_of((1e-2, 0.5))))


def unit_length(b: Builder) -> bool:
    """LpNormalization along an axis."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    return b.add(b.emit("LpNormalization", [x], axis=axis, p=b.choose.integer(1, 2)))


def skipped(b: Builder) -> bool:
    """A sum and its norm in one node, with the sum as an output now and then."""
    x = b.pick(3)
    if x is None:
        return False
    y = b.choose.one_of([name for name in b.pool if b.shape(name) == b.shape(x)])
    width = b.shape(x)[-1]
    simplified = b.choose.chance(0.7)
    affine = [_scale(b, width)] if simplified else [_scale(b, width), _scale(b, width)]
    inputs = [x, y, *affine]
    if b.choose.chance(0.4):
        inputs.append(b.initializer(b.vector(width), "b"))
    operator = "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization"
    outputs = 4 if b.choose.chance(0.6) else 1
    made = b.emit(operator, inputs, outputs, domain=MICROSOFT, epsilon=1e-2)
    if made is None:
        return False
    return b.add(made, *([b.nodes[-1].output[3]] if outputs == 4 else []))


def grouped(b: Builder) -> bool:
    """GroupNormalization, as one node or as exporters write it out."""
    x = b.pick(3, 4)
    if x is None:
        return False
    shape = b.shape(x)
    divisors = [groups for groups in (2, 3, 4, 6) if shape[1] % groups == 0]
    if not divisors:
        return False
    groups = b.choose.one_of(divisors)
    if b.opset >= 18 and b.choose.chance(0.5):
        size = shape[1] if b.opset >= 21 else groups
        inputs = [x, _scale(b, size), _scale(b, size)]
        return b.add(b.emit("GroupNormalization", inputs, num_groups=groups, epsilon=1e-2))
    apart = b.emit("Reshape", [x, b.ints(0, groups, -1)])
    if apart is None:
        return False
    one, zero = (b.initializer(np.full(groups, value, np.float32), "k") for value in (1, 0))
    normal = b.emit("InstanceNormalization", [apart, one, zero], epsilon=1e-2)
    if normal is None:
        return False
    back = b.emit("Reshape", [normal, b.target(*shape)])
    own = (shape[1], *([1] * (len(shape) - 2)))
    for operator in ("Mul", "Add"):
        back = (
            None
            if back is None
            else b.emit(operator, [back, b.initializer(b.vector(shape[1]).reshape(own), "s")])
        )
    return b.add(back)


def fused_convolution(b: Builder) -> bool:
    """FusedConv, with an activation and what is added before it."""
    x = b.pick(4)
    if x is None:
        return False
    channels, out = b.shape(x)[1], b.choose.one_of((4, 6, 8))
    if b.choose.chance(0.4):
        out = channels
    inputs = [x, b.weight((out, channels, 3, 3), 9 * channels, out=0, column=1), _scale(b, out)]
    activation, params = b.choose.one_of(
        (
            ("Relu", ()),
            ("LeakyRelu", (0.1,)),
            ("Clip", (-0.5, 1.0)),
            ("HardSigmoid", (0.3, 0.4)),
            ("Tanh", ()),
        )
    )
    fits = [name for name in b.pool if b.shape(name) == (b.shape(x)[0], out, *b.shape(x)[2:])]
    if fits and b.choose.chance(0.6):
        inputs.append(b.choose.one_of(fits))
    extra = {"activation_params": list(params)} if params else {}
    return b.add(
        b.emit(
            "FusedConv",
            inputs,
            domain=MICROSOFT,
            activation=activation,
            pads=[1] * 4,
            kernel_shape=[3, 3],
            **extra,
        )
    )


def fused_gemm(b: Builder) -> bool:
    """FusedGemm with an activation."""
    x = b.pick(2)
    if x is None:
        return False
    size, width = b.shape(x)[1], b.choose.one_of((4, 6, 8))
    inputs = [x, b.weight((width, size), size, out=0, column=1), _scale(b, width)]
    activation = b.choose.one_of(("Relu", "LeakyRelu", "Tanh", "Elu"))
    extra = {"activation_alpha": 0.2} if activation in {"LeakyRelu", "Elu"} else {}
    return b.add(b.emit("FusedGemm", inputs, domain=MICROSOFT, activation=activation, transB=1, **extra))


def fused_product(b: Builder) -> bool:
    """FusedMatMul of a tensor and a weight, or of two tensors as attention has them."""
    x = b.pick(3, 4)
    if x is None:
        return False
    alpha = b.choose.one_of((0.5, 2.0))
    size = b.shape(x)[-1]
    fits = [name for name in b.pool if b.shape(name)[:-2] == b.shape(x)[:-2] and b.shape(name)[-1] == size]
    if b.choose.chance(0.5):
        y = b.choose.one_of(fits)
        made = b.emit("FusedMatMul", [x, y], domain=MICROSOFT, transB=1, alpha=alpha)
        if made is not None and b.choose.chance(0.5):
            made = b.emit("Softmax", [made], axis=-1)
            made = None if made is None else b.emit("FusedMatMul", [made, y], domain=MICROSOFT, alpha=alpha)
        return b.add(made)
    width = b.choose.one_of((4, 6, 8))
    weight = b.weight((width, size), size, out=0, column=1)
    return b.add(b.emit("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1, alpha=alpha))


def turned_product(b: Builder) -> bool:
    """FusedMatMul that transposes its first operand, or multiplies a weight from the left."""
    x = b.pick(3)
    if x is None:
        return False
    size, width = b.shape(x)[1], b.choose.one_of((4, 6))
    if b.choose.chance(0.5):
        weight = b.weight((size, width), size, out=1, column=0)
        return b.add(b.emit("FusedMatMul", [x, weight], domain=MICROSOFT, transA=1))
    weight = b.weight((width, size), size, out=0, column=1)
    return b.add(b.emit("FusedMatMul", [weight, x], domain=MICROSOFT, alpha=0.5))


def gelus(b: Builder) -> bool:
    """The runtime's own Gelu, with and without a bias."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    operator = b.choose.one_of(("Gelu", "QuickGelu", "FastGelu", "BiasGelu", "FastGelu"))
    inputs = [x]
    if operator == "BiasGelu" or (operator == "FastGelu" and b.choose.chance(0.5)):
        inputs.append(b.initializer(b.vector(b.shape(x)[-1]), "b"))
    return b.add(b.emit(operator, inputs, domain=MICROSOFT))


STEPS = (
    *(root_mean_square, skipped, grouped, fused_convolution) * 2,
    unit_length,
    fused_gemm,
    fused_product,
    turned_product,
    gelus,
)
