"""Language models of the transformers library."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from networks.entries import TEXT_AXES, WORDS, Entry, Ids, Pair, Text, id_inputs, library, pair_inputs, text_inputs
from networks.sites import End, Site, heads, mixed_heads, neurons, packed_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

DIM, HEADS, SIZE, HIDDEN, DEPTH = 32, 4, 8, 48, 2
ID_AXES = TEXT_AXES[:2]
PAIR_AXES = (*ID_AXES, "targets.0=batch", "targets.1=steps")
USUAL = {
    "vocab_size": WORDS,
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
}
BERT_FFN = neurons("intermediate.dense", down="output.dense")
GATED = neurons("gate_proj", "up_proj", down="down_proj")
PROJECTIONS = "q_proj k_proj v_proj"


def _encoder(name: str, sites: Sequence[Site], **settings: Any) -> Entry:
    return library(Text, name, sites, text_inputs, dynamic=TEXT_AXES, **{**USUAL, **settings})


def _decoder(name: str, sites: Sequence[Site], **settings: Any) -> Entry:
    settings = {**USUAL, "fixed": {"use_cache": False}, **settings}
    return library(Ids, name, sites, id_inputs, dynamic=ID_AXES, **settings)


def _bert_heads(counted: str = "num_attention_heads") -> Site:
    counts = {f"self:{counted}": 1, "self:all_head_size": SIZE}
    return heads(SIZE, "self.query self.key self.value", "output.dense", counts=counts)


LANGUAGE: dict[str, Entry] = {
    "BERT": _encoder("Bert", (_bert_heads(), BERT_FFN)),
    "RoBERTa": _encoder("Roberta", (_bert_heads(), BERT_FFN), pad_token_id=1),
    "DistilBERT": library(
        Text,
        "DistilBert",
        (
            heads(SIZE, "q_lin k_lin v_lin", "out_lin", counts={":n_heads": 1, ":dim": SIZE}),
            neurons("ffn.lin1", down="ffn.lin2"),
        ),
        text_inputs,
        dynamic=TEXT_AXES,
        vocab_size=WORDS,
        dim=DIM,
        n_layers=DEPTH,
        n_heads=HEADS,
        hidden_dim=HIDDEN,
        max_position_embeddings=64,
    ),
    "GPT-2": library(
        Ids,
        "GPT2",
        (
            packed_heads(SIZE, "attn.c_attn", "attn.c_proj", counts={"attn:num_heads": 1, "attn:split_size": SIZE}),
            neurons("mlp.c_fc", down="mlp.c_proj"),
        ),
        id_inputs,
        dynamic=ID_AXES,
        fixed={"use_cache": False},
        vocab_size=WORDS,
        n_embd=DIM,
        n_layer=DEPTH,
        n_head=HEADS,
        n_inner=HIDDEN,
        n_positions=64,
    ),
    "OPT": _decoder(
        "OPT",
        (
            heads(SIZE, PROJECTIONS, "out_proj", counts={":num_heads": 1, ":embed_dim": SIZE}),
            neurons("fc1", down="fc2"),
        ),
        ffn_dim=HIDDEN,
        word_embed_proj_dim=DIM,
    ),
    "Llama": _decoder("Llama", (heads(SIZE, PROJECTIONS, "o_proj", per=2), GATED), num_attention_heads=8, num_key_value_heads=4, head_dim=SIZE),
}
_ = (End, Pair, PAIR_AXES, mixed_heads, pair_inputs, partial)
