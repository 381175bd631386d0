"""Vision models of the transformers library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from networks.entries import IMAGE_AXES, Entry, Pixels, images, library
from networks.sites import End, Site, channels, heads, neurons, packed_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

DIM, HEADS, SIZE, HIDDEN, DEPTH = 32, 4, 8, 48, 2
USUAL = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 32,
    "patch_size": 8,
}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [4, 8],
    "window_size": 4,
}
PYRAMID = {
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
FC = neurons("fc1", down="fc2")
FFN = neurons("intermediate.dense", down="output.dense")
PROJECTIONS = "q_proj k_proj v_proj"
O_HEADS = heads(SIZE, PROJECTIONS, "o_proj")
OUT_HEADS = heads(SIZE, PROJECTIONS, "out_proj")
OLD_HEADS = heads(SIZE, "attention.query attention.key attention.value", "output.dense")
INVERTED = channels(
    "expand_1x1.convolution",
    "reduce_1x1.convolution",
    "expand_1x1.normalization",
    "conv_3x3.normalization",
    depthwise="conv_3x3.convolution",
)
RESIDUAL = channels("convolution1", "convolution2")


def _separable(first: int) -> Site:
    """Channels of a pointwise convolution, through the depthwise one behind it."""
    names = [f"layer.{at}" for at in range(first, first + 3)]
    norms = [f"{name}.normalization" for name in names[:2]]
    write, middle, read = (f"{name}.convolution" for name in names)
    return channels(write, read, *norms, depthwise=middle)


def _block_heads(size: int, above: str) -> Site:
    return heads(size, "attention.query attention.key attention.value", "output.dense", above=above)


def _vision(name: str, sites: Sequence[Site], size: int = 32, **settings: Any) -> Entry:
    return library(Pixels, name, sites, images(2, 3, size, size), dynamic=IMAGE_AXES, **settings)


VISION: dict[str, Entry] = {
    "ViT": _vision("ViT", (O_HEADS, FC), **USUAL),
    "DeiT": _vision("DeiT", (O_HEADS, FC), **USUAL),
    "BEiT": _vision("Beit", (O_HEADS, FC), **USUAL),
    "DINOv2": _vision("Dinov2", (O_HEADS, FC), **USUAL),
    "CLIP vision": _vision("CLIPVision", (OUT_HEADS, FC), **USUAL),
    "SigLIP vision": _vision(
        "SiglipVision", (heads(SIZE, PROJECTIONS, "out_proj", above="layers"), FC), **USUAL
    ),
    "BLIP vision": _vision(
        "BlipVision", (packed_heads(SIZE, "qkv", "projection", by_hand=True), FC), **USUAL
    ),
    "YOLOS": _vision("Yolos", (OLD_HEADS, FFN), **{**USUAL, "image_size": [32, 32]}, num_detection_tokens=5),
    "DPT": _vision(
        "DPT",
        (OLD_HEADS, FFN, RESIDUAL),
        model="ForDepthEstimation",
        output="predicted_depth",
        **{**USUAL, "num_hidden_layers": 4},
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
    ),
    "Swin": _vision(
        "Swin",
        (
            heads(4, PROJECTIONS, "o_proj", End("relative_position_bias.relative_position_bias_table", "in")),
            FC,
        ),
        **WINDOWS,
    ),
    "Swin v2": _vision(
        "Swinv2",
        (
            heads(
                4,
                "self.query self.key self.value",
                "output.dense",
                End("self.continuous_position_bias_mlp.2"),
                End("self.logit_scale", axis=0),
            ),
            FFN,
        ),
        **WINDOWS,
    ),
    "SegFormer": _vision(
        "Segformer",
        (
            O_HEADS,
            Site(
                "neuron",
                (End("mlp.fc1", zero=(0,)), End("mlp.dwconv.dwconv", zero=(0,)), End("mlp.fc2", "in")),
            ),
        ),
        **PYRAMID,
        sr_ratios=[2, 1],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    "PVT": _vision(
        "Pvt",
        (heads(SIZE, "self.query self.key self.value", "output.dense"), neurons("dense1", down="dense2")),
        image_size=32,
        **{**PYRAMID, "patch_sizes": [4, 2]},
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        sequence_reduction_ratios=[2, 1],
    ),
    "PoolFormer": _vision(
        "PoolFormer", (channels("output.conv1", "output.conv2"),), **PYRAMID, padding=[2, 1], mlp_ratio=2.0
    ),
    "MobileViT": _vision(
        "MobileViT",
        (
            INVERTED,
            *(_block_heads(size, f"encoder.layer.{at}.") for at, size in ((2, 4), (3, 6), (4, 8))),
            FFN,
        ),
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 40],
        num_attention_heads=4,
        mlp_ratio=2.0,
    ),
    "LeViT": _vision(
        "Levit",
        (
            Site(
                "neuron",
                (
                    End("linear_up.linear", zero=(0,)),
                    End("linear_up.batch_norm"),
                    End("linear_down.linear", "in"),
                ),
            ),
        ),
        64,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        attention_ratio=[2, 2, 2],
        mlp_ratio=[2, 2, 2],
    ),
    "ConvNeXt": _vision(
        "ConvNext", (neurons("pwconv1", down="pwconv2"),), hidden_sizes=[16, 32], depths=[2, 1], num_stages=2
    ),
    "ResNet": _vision(
        "ResNet",
        (
            channels("layer.0.convolution", "layer.1.convolution", "layer.0.normalization"),
            channels("layer.1.convolution", "layer.2.convolution", "layer.1.normalization"),
        ),
        embedding_size=16,
        hidden_sizes=[32, 48],
        depths=[2, 1],
        layer_type="bottleneck",
    ),
    "RegNet": _vision(
        "RegNet",
        (channels("attention.0", "attention.2"),),
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        groups_width=8,
        layer_type="y",
    ),
    "EfficientNet": _vision(
        "EfficientNet",
        (
            Site(
                "channel",
                (
                    End("expansion.expand_conv", zero=(0,)),
                    End("expansion.expand_bn"),
                    End("depthwise_conv.depthwise_conv", zero=(0,)),
                    End("depthwise_conv.depthwise_norm"),
                    End("squeeze_excite.expand"),
                    End("squeeze_excite.reduce", "in"),
                    End("projection.project_conv", "in"),
                ),
                silent=True,
            ),
            channels("squeeze_excite.reduce", "squeeze_excite.expand"),
        ),
        64,
        image_size=64,
        kernel_sizes=[3, 3],
        in_channels=[32, 16],
        out_channels=[16, 24],
        depthwise_padding=[],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 6],
        hidden_dim=1280,
        width_coefficient=1.0,
        depth_coefficient=1.0,
    ),
    "MobileNetV1": _vision(
        "MobileNetV1",
        tuple(_separable(at) for at in (1, 5, 9)),
        64,
        depth_multiplier=0.25,
        tf_padding=False,
        image_size=64,
    ),
    "MobileNetV2": _vision(
        "MobileNetV2", (INVERTED,), 64, depth_multiplier=0.25, tf_padding=False, image_size=64
    ),
}
