"""Transformers, parameterised by head counts and hidden widths of every block."""

# ruff: noqa: D102  # the class says what `forward` computes, and `sites` and `site` are those of zoo.sites
from __future__ import annotations

import torch
from torch import nn

from zoo.sites import Shift, Site, Slot, Widths, columns, rows, shift


class Attention(nn.Module):
    """Self-attention whose projections are separate, packed (5-D reshape) or packed (three chunks)."""

    def __init__(self, dim: int, heads: int, size: int, form: str) -> None:
        super().__init__()
        self.heads, self.size, self.form = heads, size, form
        inner = heads * size
        if form == "separate":
            self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * inner)
        self.out = nn.Linear(inner, dim)

    def forward(self, x):
        batch, length, _ = x.shape
        if self.form == "packed":
            qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        else:
            parts = (self.q(x), self.k(x), self.v(x)) if self.form == "separate" else self.qkv(x).chunk(3, -1)
            q, k, v = (p.view(batch, length, self.heads, self.size).transpose(1, 2) for p in parts)
            y = torch.softmax(q @ k.transpose(-2, -1) * self.size**-0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, self.heads * self.size))

    def site(self, key: str) -> Site:
        """The heads, dead by their value rows or by the out-projection's columns."""
        value, offset = (self.v, 0) if self.form == "separate" else (self.qkv, 2 * self.heads * self.size)
        return head_site(key, self.heads, self.size, value, self.out, offset=offset)


def head_site(key: str, heads: int, size: int, value: nn.Module, out: nn.Module, *, offset: int = 0) -> Site:
    """Whole heads of an attention whose value projection begins at row `offset`."""
    return Site(
        key,
        heads,
        "head",
        rows(value, block=size, offset=offset),
        [shift(value, block=size, offset=offset)],
        columns(out, block=size),
    )


class Packed(nn.Module):
    """`nn.MultiheadAttention`, which exists at full width only."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]

    def site(self, key: str) -> Site:
        m, offset = self.mha, 2 * self.heads * self.size
        return Site(
            key,
            self.heads,
            "head",
            [Slot(m.in_proj_weight, 0, self.size, offset)],
            [Shift(m.in_proj_bias, None, self.size, offset)],
            columns(m.out_proj, block=self.size),
        )


class Block(nn.Module):
    """Pre-norm attention and multilayer perceptron."""

    def __init__(self, dim: int, heads: int, size: int, hidden: int, form: str) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        whole = form == "mha" and heads * size == dim
        # a native network with fewer heads cannot be nn.MultiheadAttention: three chunks have its weights
        self.attn = Packed(dim, heads) if whole else Attention(dim, heads, size, form)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.down(nn.functional.gelu(self.up(self.n2(x))))


class Vit(nn.Module):
    """A vision transformer with a class token and position embeddings."""

    def __init__(
        self, widths: Widths, form: str = "separate", *, dim: int = 32, size: int = 8, depth: int = 2
    ) -> None:
        super().__init__()
        self.widths = widths
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 17, dim))
        self.blocks = nn.ModuleList(
            Block(dim, widths[f"heads{i}"], size, widths[f"mlp{i}"], form) for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm(x)[:, 0])

    def sites(self) -> list[Site]:
        found = []
        for i, b in enumerate(self.blocks):
            found += [
                b.attn.site(f"heads{i}"),
                Site(f"mlp{i}", b.up.out_features, "neuron", rows(b.up), [shift(b.up)], columns(b.down)),
            ]
        return found


class Bert(nn.Module):
    """`transformers.BertModel`, shrunk by replacing the projections of each layer."""

    def __init__(
        self, widths: Widths, form: str = "sdpa", *, dim: int = 32, heads: int = 4, depth: int = 2
    ) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel  # noqa: PLC0415  # slow to import, and optional

        self.widths, self.size = widths, dim // heads
        config = BertConfig(
            vocab_size=50,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=64,
            max_position_embeddings=40,
            attn_implementation=form,
        )
        self.bert = BertModel(config)
        for i, layer in enumerate(self.bert.encoder.layer):
            own, inner, hidden = layer.attention.self, widths[f"heads{i}"] * self.size, widths[f"mlp{i}"]
            own.query, own.key, own.value = (nn.Linear(dim, inner) for _ in range(3))
            own.num_attention_heads, own.all_head_size = widths[f"heads{i}"], inner
            layer.attention.output.dense = nn.Linear(inner, dim)
            layer.intermediate.dense = nn.Linear(dim, hidden)
            layer.output.dense = nn.Linear(hidden, dim)

    def forward(self, ids, mask):
        out = self.bert(input_ids=ids, attention_mask=mask)
        return out.last_hidden_state, out.pooler_output

    def sites(self) -> list[Site]:
        found = []
        for i, layer in enumerate(self.bert.encoder.layer):
            own, up, down = layer.attention.self, layer.intermediate.dense, layer.output.dense
            heads = own.num_attention_heads
            found += [
                head_site(f"heads{i}", heads, self.size, own.value, layer.attention.output.dense),
                Site(f"mlp{i}", up.out_features, "neuron", rows(up), [shift(up)], columns(down)),
            ]
        return found
