"""Sound and time series: models of the transformers library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from networks.entries import WORDS, Entry, Taken, Waves, images, library
from networks.sites import Site, channels, heads, neurons

if TYPE_CHECKING:
    from collections.abc import Sequence

DIM, HEADS, SIZE, HIDDEN, DEPTH = 32, 4, 8, 48, 2
OUT_HEADS = heads(SIZE, "q_proj k_proj v_proj", "out_proj")
O_HEADS = heads(SIZE, "q_proj k_proj v_proj", "o_proj")
FC = neurons("fc1", down="fc2")
SPEECH_FFN = neurons("feed_forward.intermediate_dense", down="feed_forward.output_dense")
BOTH = {
    "d_model": DIM,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
}
SPEECH = {
    "vocab_size": WORDS,
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 3],
    "conv_stride": [3, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
}
FORECAST = {
    "prediction_length": 4,
    "context_length": 12,
    "input_size": 3,
    "num_time_features": 2,
    "lags_sequence": [1],
}


class Speech(Taken):
    """Spectrograms and the tokens so far."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        return self.call(input_features=x, decoder_input_ids=targets)


class Past(Taken):
    """The past of several series."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        return self.call(past_values=x)


class Forecast(Taken):
    """Past and future of several series with the features of their times."""

    def forward(
        self,
        past: torch.Tensor,
        times: torch.Tensor,
        seen: torch.Tensor,
        future: torch.Tensor,
        ahead: torch.Tensor,
    ) -> torch.Tensor:
        """Run the model."""
        return self.call(
            past_values=past,
            past_time_features=times,
            past_observed_mask=seen,
            future_values=future,
            future_time_features=ahead,
        )


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def _speech_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, WORDS, (2, 9), generator=torch.Generator().manual_seed(2))
    return {"x": _draw(2, 8, 32), "targets": tokens}


def _forecast_inputs() -> dict[str, torch.Tensor]:
    return {
        "past": _draw(2, 13, 3),
        "times": _draw(2, 13, 2),
        "seen": torch.ones(2, 13, 3),
        "future": _draw(2, 4, 3),
        "ahead": _draw(2, 4, 2),
    }


def _forecast(name: str, sites: Sequence[Site], **settings: Any) -> Entry:
    axes = tuple(f"{part}.0=batch" for part in ("past", "times", "seen", "future", "ahead"))
    more = {"fixed": {"use_cache": False}, **FORECAST, **BOTH, "decoder_layers": 1, **settings}
    return library(Forecast, name, sites, _forecast_inputs, dynamic=axes, **more)


SERIES: dict[str, Entry] = {
    "Whisper": library(
        Speech,
        "Whisper",
        (OUT_HEADS, FC, channels("encoder.conv1", "encoder.conv2")),
        _speech_inputs,
        dynamic=("x.0=batch", "targets.0=batch", "targets.1=steps"),
        fixed={"use_cache": False},
        vocab_size=WORDS,
        **BOTH,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "Wav2Vec2": library(
        Waves, "Wav2Vec2", (OUT_HEADS, SPEECH_FFN), images(2, 400), dynamic=("x.0=batch",), **SPEECH
    ),
    "HuBERT": library(
        Waves, "Hubert", (OUT_HEADS, SPEECH_FFN), images(2, 400), dynamic=("x.0=batch",), **SPEECH
    ),
    "AST": library(
        Waves,
        "AST",
        (O_HEADS, FC),
        images(2, 24, 16),
        dynamic=("x.0=batch",),
        config="ASTConfig",
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        num_mel_bins=16,
        max_length=24,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    "PatchTST": library(
        Past,
        "PatchTST",
        (OUT_HEADS, neurons("ff.0", down="ff.3")),
        images(2, 24, 3),
        dynamic=("x.0=batch",),
        num_input_channels=3,
        context_length=24,
        patch_length=4,
        patch_stride=4,
        d_model=DIM,
        num_attention_heads=HEADS,
        ffn_dim=HIDDEN,
        num_hidden_layers=DEPTH,
        pre_norm=True,
    ),
    "PatchTSMixer": library(
        Past,
        "PatchTSMixer",
        (neurons("mlp.fc1", down="mlp.fc2"),),
        images(2, 24, 3),
        dynamic=("x.0=batch",),
        num_input_channels=3,
        context_length=24,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_layers=DEPTH,
    ),
    "TimeSeriesTransformer": _forecast("TimeSeriesTransformer", (OUT_HEADS, FC)),
    "Informer": _forecast("Informer", (OUT_HEADS, FC), attention_type="full"),
    "Autoformer": _forecast("Autoformer", (FC,), moving_average=5),
}
