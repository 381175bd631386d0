"""Language models of the transformers library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from networks.entries import (
    TEXT_AXES,
    WORDS,
    Entry,
    Ids,
    Pair,
    Text,
    id_inputs,
    library,
    pair_inputs,
    text_inputs,
)
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
SHORT = {
    "vocab_size": WORDS,
    "n_embd": DIM,
    "n_layer": DEPTH,
    "n_head": HEADS,
    "n_inner": HIDDEN,
    "n_positions": 64,
}
BOTH = {
    "vocab_size": WORDS,
    "d_model": DIM,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "max_position_embeddings": 64,
}
UNCACHED = {"use_cache": False}
FFN = neurons("intermediate.dense", down="output.dense")
FC = neurons("fc1", down="fc2")
GATED = neurons("gate_proj", "up_proj", down="down_proj")
WIDE = neurons("dense_h_to_4h", down="dense_4h_to_h")
SHARED = neurons("shared_expert.gate_proj", "shared_expert.up_proj", down="shared_expert.down_proj")
SELF = heads(SIZE, "self.query self.key self.value", "output.dense")
PROJECTIONS = "q_proj k_proj v_proj"
OUT_HEADS = heads(SIZE, PROJECTIONS, "out_proj")
O_HEADS = heads(SIZE, PROJECTIONS, "o_proj")
SHARED_KEYS = heads(SIZE, PROJECTIONS, "o_proj", per=2)
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": SIZE}
EXPERTS = Site("neuron", (End("experts.gate_up_proj", parts=2, zero=(0, 1)), End("experts.down_proj", "in")))
T5_HEADS = (
    heads(
        SIZE,
        "SelfAttention.q SelfAttention.k SelfAttention.v",
        "SelfAttention.o",
        End("SelfAttention.relative_attention_bias", "in", optional=True),
        together=True,
    ),
    heads(SIZE, "EncDecAttention.q EncDecAttention.k EncDecAttention.v", "EncDecAttention.o", together=True),
)


def _encoder(name: str, sites: Sequence[Site], **settings: Any) -> Entry:
    return library(Text, name, sites, text_inputs, **{"dynamic": TEXT_AXES, **USUAL, **settings})


def _decoder(name: str, sites: Sequence[Site], **settings: Any) -> Entry:
    settings = {**USUAL, "fixed": UNCACHED, **settings}
    return library(Ids, name, sites, id_inputs, dynamic=ID_AXES, **settings)


def _other(name: str, sites: Sequence[Site], **settings: Any) -> Entry:
    """Make an entry for a decoder whose configuration has names of its own."""
    settings = {"dynamic": ID_AXES, "fixed": UNCACHED, "vocab_size": WORDS, **settings}
    return library(Ids, name, sites, id_inputs, **settings)


def _pair(name: str, sites: Sequence[Site], **settings: Any) -> Entry:
    settings = {"fixed": UNCACHED, **settings}
    return library(Pair, name, sites, pair_inputs, dynamic=PAIR_AXES, **settings)


ENCODERS: dict[str, Entry] = {
    "BERT": _encoder("Bert", (SELF, FFN)),
    "RoBERTa": _encoder("Roberta", (SELF, FFN)),
    "DistilBERT": library(
        Text,
        "DistilBert",
        (heads(SIZE, "q_lin k_lin v_lin", "out_lin"), neurons("ffn.lin1", down="ffn.lin2")),
        text_inputs,
        dynamic=TEXT_AXES,
        vocab_size=WORDS,
        dim=DIM,
        n_layers=DEPTH,
        n_heads=HEADS,
        hidden_dim=HIDDEN,
        max_position_embeddings=64,
    ),
    "ALBERT": _encoder(
        "Albert",
        (
            heads(SIZE, "attention.query attention.key attention.value", "attention.dense"),
            neurons("ffn", down="ffn_output"),
        ),
        embedding_size=16,
    ),
    "ELECTRA": _encoder("Electra", (SELF, FFN), embedding_size=16),
    "MPNet": _encoder(
        "MPNet",
        (
            heads(
                SIZE,
                "layer.0.attention.attn.q layer.0.attention.attn.k layer.0.attention.attn.v",
                "layer.0.attention.attn.o",
                End("relative_attention_bias", "in"),
            ),
            FFN,
        ),
        num_hidden_layers=1,
    ),
    "DeBERTa": _encoder(
        "Deberta",
        (
            mixed_heads(
                SIZE,
                "self.in_proj",
                "output.dense",
                End("self.v_bias", unit=SIZE),
                End("self.q_bias", unit=SIZE),
                End("self.pos_proj", unit=SIZE),
                End("self.pos_q_proj", unit=SIZE),
            ),
            FFN,
        ),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "DeBERTa v2": _encoder(
        "DebertaV2",
        (
            heads(
                SIZE,
                "self.query_proj self.key_proj self.value_proj",
                "output.dense",
                End("self.pos_key_proj", unit=SIZE),
                End("self.pos_query_proj", unit=SIZE),
            ),
            FFN,
        ),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "RoFormer": _encoder("RoFormer", (SELF, FFN), embedding_size=DIM),
    "ModernBERT": _encoder(
        "ModernBert",
        (
            packed_heads(SIZE, "attn.Wqkv", "attn.Wo"),
            Site("neuron", (End("mlp.Wi", parts=2, zero=(0, 1)), End("mlp.Wo", "in"))),
        ),
        pad_token_id=0,
        global_attn_every_n_layers=2,
        local_attention=8,
    ),
    "MobileBERT": _encoder(
        "MobileBert", (FFN,), embedding_size=16, true_hidden_size=DIM, intra_bottleneck_size=DIM
    ),
    "ConvBERT": _encoder("ConvBert", (FFN,), embedding_size=DIM, head_ratio=2),
    "Nystromformer": library(
        Ids,
        "Nystromformer",
        (FFN,),
        id_inputs,
        dynamic=ID_AXES[:1],
        **USUAL,
        num_landmarks=4,
        segment_means_seq_len=12,
    ),
    "Longformer": _encoder("Longformer", (FFN,), attention_window=4),
    "FNet": library(
        Ids,
        "FNet",
        (FFN,),
        id_inputs,
        dynamic=ID_AXES,
        **{k: v for k, v in USUAL.items() if k != "num_attention_heads"},
    ),
    "XLNet": library(
        Text,
        "XLNet",
        (neurons("ff.layer_1", down="ff.layer_2"),),
        text_inputs,
        dynamic=TEXT_AXES,
        vocab_size=WORDS,
        d_model=DIM,
        n_layer=DEPTH,
        n_head=HEADS,
        d_inner=HIDDEN,
        fixed={"use_mems": False},
    ),
    "CLIP text": library(
        Text,
        "CLIPText",
        (OUT_HEADS, FC),
        text_inputs,
        dynamic=TEXT_AXES,
        **USUAL,
        eos_token_id=2,
        bos_token_id=1,
    ),
}

DECODERS: dict[str, Entry] = {
    "GPT-2": _other(
        "GPT2",
        (packed_heads(SIZE, "attn.c_attn", "attn.c_proj"), neurons("mlp.c_fc", down="mlp.c_proj")),
        **SHORT,
    ),
    "GPT-Neo": _other(
        "GPTNeo",
        (OUT_HEADS, neurons("mlp.c_fc", down="mlp.c_proj")),
        hidden_size=DIM,
        num_layers=DEPTH,
        num_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "GPT-NeoX": _decoder("GPTNeoX", (mixed_heads(SIZE, "query_key_value", "dense"), WIDE)),
    "GPT-J": _other("GPTJ", (OUT_HEADS, neurons("fc_in", down="fc_out")), **SHORT, rotary_dim=4),
    "CodeGen": _other("CodeGen", (neurons("fc_in", down="fc_out"),), **SHORT, rotary_dim=4),
    "OPT": _decoder("OPT", (OUT_HEADS, FC), ffn_dim=HIDDEN, word_embed_proj_dim=DIM),
    "Bloom": _other(
        "Bloom",
        (mixed_heads(SIZE, "query_key_value", "dense", by_hand=True), WIDE),
        hidden_size=DIM,
        n_layer=DEPTH,
        n_head=HEADS,
    ),
    "MPT": _other(
        "Mpt",
        (
            packed_heads(SIZE, "attn.Wqkv", "attn.out_proj", by_hand=True),
            neurons("ffn.up_proj", down="ffn.down_proj"),
        ),
        d_model=DIM,
        n_layers=DEPTH,
        n_heads=HEADS,
        expansion_ratio=2,
        max_seq_len=64,
    ),
    "Falcon": _other(
        "Falcon",
        (mixed_heads(SIZE, "query_key_value", "dense"), WIDE),
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        new_decoder_architecture=False,
        multi_query=False,
        alibi=False,
        bias=True,
    ),
    "Llama": _decoder("Llama", (SHARED_KEYS, GATED), **GROUPED),
    "Mistral": _decoder("Mistral", (SHARED_KEYS, GATED), **GROUPED, sliding_window=8),
    "Qwen2": _decoder(
        "Qwen2", (heads(4, PROJECTIONS, "o_proj", per=2), GATED), num_attention_heads=8, num_key_value_heads=4
    ),
    "Qwen3": _decoder("Qwen3", (SHARED_KEYS, GATED), **GROUPED),
    "Gemma": _decoder("Gemma", (SHARED_KEYS, GATED), **GROUPED),
    "Gemma 2": _decoder("Gemma2", (SHARED_KEYS, GATED), **GROUPED, sliding_window=8),
    "Phi": _decoder("Phi", (heads(SIZE, PROJECTIONS, "dense"), FC)),
    "Phi-3": _decoder(
        "Phi3",
        (Site("neuron", (End("gate_up_proj", parts=2, zero=(0, 1)), End("down_proj", "in"))),),
        pad_token_id=0,
    ),
    "OLMo": _decoder("Olmo", (O_HEADS, GATED)),
    "StableLM": _decoder("StableLm", (O_HEADS, GATED), num_key_value_heads=HEADS),
    "Cohere": _decoder("Cohere", (O_HEADS, GATED), pad_token_id=0),
    "StarCoder2": _decoder(
        "Starcoder2",
        (heads(4, PROJECTIONS, "o_proj", per=2), neurons("mlp.c_fc", down="mlp.c_proj")),
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "Mixtral": _decoder(
        "Mixtral", (SHARED_KEYS, EXPERTS), **GROUPED, num_local_experts=3, experts_implementation="eager"
    ),
    "Qwen2-MoE": _decoder(
        "Qwen2Moe",
        (heads(4, PROJECTIONS, "o_proj", per=2), SHARED, EXPERTS),
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "Mamba": _other(
        "Mamba",
        (
            Site(
                "neuron",
                (
                    End("in_proj", parts=2, zero=(0, 1)),
                    End("conv1d"),
                    End("dt_proj"),
                    End("A_log"),
                    End("D"),
                    End("x_proj", "in"),
                    End("out_proj", "in"),
                ),
            ),
        ),
        hidden_size=DIM,
        num_hidden_layers=1,
        state_size=4,
    ),
    "RWKV": _other(
        "Rwkv",
        (neurons("feed_forward.key", down="feed_forward.value"),),
        hidden_size=DIM,
        num_hidden_layers=2,
        attention_hidden_size=DIM,
        intermediate_size=HIDDEN,
        context_length=64,
    ),
}

PAIRS: dict[str, Entry] = {
    "T5": _pair(
        "T5",
        (
            *T5_HEADS,
            neurons("wi", down="wo"),
        ),
        vocab_size=WORDS,
        d_model=DIM,
        d_kv=SIZE,
        d_ff=HIDDEN,
        num_layers=DEPTH,
        num_heads=HEADS,
    ),
    "BART": _pair("Bart", (OUT_HEADS, FC), **BOTH),
    "Pegasus": _pair("Pegasus", (OUT_HEADS, FC), **BOTH),
    "Marian": _pair("Marian", (OUT_HEADS, FC), **BOTH, pad_token_id=1),
}

LANGUAGE: dict[str, Entry] = {**ENCODERS, **DECODERS, **PAIRS}
