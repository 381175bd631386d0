"""Vision models of the transformers library."""

from __future__ import annotations

from typing import Any

from networks.entries import IMAGE_AXES, Entry, Pixels, images, library
from networks.sites import channels, heads, neurons

DIM, HEADS, SIZE, HIDDEN, DEPTH = 32, 4, 8, 48, 2
USUAL = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 32,
    "patch_size": 8,
}
MLP = neurons("fc1", down="fc2")
VIT_HEADS = heads(SIZE, "q_proj k_proj v_proj", "o_proj")
BOTTLENECK = (
    channels("layer.0.convolution", "layer.1.convolution", "layer.0.normalization"),
    channels("layer.1.convolution", "layer.2.convolution", "layer.1.normalization"),
)


def _vision(name: str, sites: Any, size: int = 32, **settings: Any) -> Entry:
    return library(Pixels, name, sites, images(2, 3, size, size), dynamic=IMAGE_AXES, **settings)


VISION: dict[str, Entry] = {
    "ViT": _vision("ViT", (VIT_HEADS, MLP), **USUAL),
    "ResNet": _vision(
        "ResNet",
        BOTTLENECK,
        embedding_size=16,
        hidden_sizes=[32, 48],
        depths=[2, 1],
        layer_type="bottleneck",
    ),
}
