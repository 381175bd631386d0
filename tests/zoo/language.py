"""Transformers of the transformers library, shrunk by replacing what their layers hold."""

# ruff: noqa: D102  # the class says what `forward` computes, and `sites` are those of zoo.sites
# ruff: noqa: PLC0415  # transformers is slow to import, and optional

from __future__ import annotations

import torch
from torch import nn

from zoo.attention import head_site
from zoo.sites import Shift, Site, Slot, Widths, columns, rows, shift


class Gpt2(nn.Module):
    """GPT-2: packed projections whose weights are transposed (Conv1D), a causal mask."""

    def __init__(self, widths: Widths, dim: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2Model
        from transformers.pytorch_utils import Conv1D

        self.widths, self.size = widths, dim // heads
        config = GPT2Config(
            vocab_size=50, n_positions=40, n_embd=dim, n_layer=depth, n_head=heads, use_cache=False
        )
        self.gpt = GPT2Model(config)
        for i, block in enumerate(self.gpt.h):
            inner, hidden = widths[f"heads{i}"] * self.size, widths[f"mlp{i}"]
            block.attn.num_heads, block.attn.split_size = widths[f"heads{i}"], inner
            block.attn.c_attn, block.attn.c_proj = Conv1D(3 * inner, dim), Conv1D(dim, inner)
            block.mlp.c_fc, block.mlp.c_proj = Conv1D(hidden, dim), Conv1D(dim, hidden)

    def forward(self, ids):
        return self.gpt(input_ids=ids, use_cache=False).last_hidden_state

    def sites(self) -> list[Site]:
        found = []
        for i, block in enumerate(self.gpt.h):
            attn, up, down = block.attn, block.mlp.c_fc, block.mlp.c_proj
            value = 2 * attn.split_size
            found += [
                Site(
                    f"heads{i}",
                    attn.num_heads,
                    "head",
                    [Slot(attn.c_attn.weight, 1, self.size, value)],
                    [Shift(attn.c_attn.bias, None, self.size, value)],
                    [Slot(attn.c_proj.weight, 0, self.size)],
                ),
                Site(
                    f"mlp{i}",
                    self.widths[f"mlp{i}"],
                    "neuron",
                    [Slot(up.weight, 1)],
                    [Shift(up.bias)],
                    [Slot(down.weight, 0)],
                ),
            ]
        return found


class Llama(nn.Module):
    """Llama: grouped queries, rotary embeddings, RMS norms, SwiGLU; no biases.

    `kvN` counts key/value heads, `perN` the query heads of each, `stream` the residual width, which an RMS
    norm lets shrink when its mean is rescaled. With `form="operator"` the norms are torch's own, which are one
    operator from opset 23 on; else they are written out.
    """

    def __init__(self, widths: Widths, size: int = 8, depth: int = 2, form: str = "eager") -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.widths, self.size = widths, size
        dim = widths["stream"]
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=dim,
            intermediate_size=8,
            num_hidden_layers=depth,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=size,
            max_position_embeddings=40,
            use_cache=False,
        )
        self.llama = LlamaForCausalLM(config)
        for i, layer in enumerate(self.llama.model.layers):
            kv, per, hidden = widths[f"kv{i}"], widths[f"per{i}"], widths[f"mlp{i}"]
            attn, mlp = layer.self_attn, layer.mlp
            attn.num_key_value_groups = per
            attn.q_proj = nn.Linear(dim, kv * per * size, bias=False)
            attn.k_proj, attn.v_proj = (nn.Linear(dim, kv * size, bias=False) for _ in range(2))
            attn.o_proj = nn.Linear(kv * per * size, dim, bias=False)
            mlp.gate_proj, mlp.up_proj = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
            mlp.down_proj = nn.Linear(hidden, dim, bias=False)
            if form == "operator":
                layer.input_layernorm, layer.post_attention_layernorm = (
                    nn.RMSNorm(dim, eps=config.rms_norm_eps) for _ in range(2)
                )
        if form == "operator":
            self.llama.model.norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)

    def forward(self, ids):
        return self.llama(input_ids=ids, use_cache=False).logits

    def sites(self) -> list[Site]:
        model, found = self.llama.model, []
        written = [Slot(model.embed_tokens.weight, 1)]
        for i, layer in enumerate(model.layers):
            attn, mlp = layer.self_attn, layer.mlp
            kv, per = self.widths[f"kv{i}"], self.widths[f"per{i}"]
            value, out = attn.v_proj, attn.o_proj
            found += [
                Site(
                    f"kv{i}",
                    kv,
                    "head",
                    rows(value, block=self.size),
                    (),
                    columns(out, block=per * self.size),
                ),
                Site(f"per{i}", per, "head", (), (), columns(out, block=self.size), (), kv),
                Site(
                    f"mlp{i}",
                    mlp.gate_proj.out_features,
                    "neuron",
                    rows(mlp.gate_proj),
                    (),
                    columns(mlp.down_proj),
                ),
            ]
            written += rows(out, mlp.down_proj)
        found.append(Site("stream", self.widths["stream"], "stream", written))
        return found


class T5(nn.Module):
    """T5's encoder: relative position biases per head that all blocks share, so heads die in all blocks."""

    def __init__(self, widths: Widths, dim: int = 32, size: int = 8, depth: int = 2) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.widths, self.size = widths, size
        config = T5Config(
            vocab_size=50,
            d_model=dim,
            d_kv=size,
            d_ff=widths["mlp"],
            num_layers=depth,
            num_heads=widths["heads"],
            dropout_rate=0.0,
            use_cache=False,
        )
        self.t5 = T5EncoderModel(config)

    def forward(self, ids, mask):
        return self.t5(input_ids=ids, attention_mask=mask).last_hidden_state

    def sites(self) -> list[Site]:
        values, outs, ups, downs = [], [], [], []
        for block in self.t5.encoder.block:
            attn, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            values, outs = [*values, attn.v], [*outs, attn.o]
            ups, downs = [*ups, mlp.wi], [*downs, mlp.wo]
        return [
            Site(
                "heads",
                self.widths["heads"],
                "head",
                rows(*values, block=self.size),
                (),
                columns(*outs, block=self.size),
            ),
            Site("mlp", self.widths["mlp"], "neuron", rows(*ups), (), columns(*downs)),
        ]


class Swin(nn.Module):
    """Swin: shifted windows, a position bias per head, merged patches."""

    def __init__(self, widths: Widths, dim: int = 16, size: int = 4) -> None:
        super().__init__()
        from transformers import SwinConfig, SwinModel

        self.widths, self.size = widths, size
        config = SwinConfig(
            image_size=32,
            patch_size=4,
            num_channels=3,
            embed_dim=dim,
            depths=[2, 1],
            num_heads=[dim // size, 2 * dim // size],
            window_size=4,
            drop_path_rate=0.0,
        )
        self.swin = SwinModel(config)
        for i, block in enumerate(self.blocks()):
            attn, mlp, heads = block.attention, block.mlp, widths[f"heads{i}"]
            width, inner, hidden = attn.q_proj.in_features, heads * size, widths[f"mlp{i}"]
            attn.num_attention_heads = heads
            attn.q_proj, attn.k_proj, attn.v_proj = (nn.Linear(width, inner) for _ in range(3))
            attn.o_proj = nn.Linear(inner, width)
            bias = attn.relative_position_bias
            bias.relative_position_bias_table = nn.Parameter(
                torch.zeros(bias.relative_position_bias_table.shape[0], heads)
            )
            mlp.fc1, mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.swin.encoder.layers for block in stage.blocks]

    def forward(self, x):
        return self.swin(pixel_values=x).last_hidden_state

    def sites(self) -> list[Site]:
        found = []
        for i, block in enumerate(self.blocks()):
            attn, mlp, width = block.attention, block.mlp, self.widths[f"mlp{i}"]
            found += [
                head_site(f"heads{i}", attn.num_attention_heads, self.size, attn.v_proj, attn.o_proj),
                Site(f"mlp{i}", width, "neuron", rows(mlp.fc1), [shift(mlp.fc1)], columns(mlp.fc2)),
            ]
        return found
