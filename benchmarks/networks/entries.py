"""What an architecture's row needs, and how networks of the transformers library are called."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from networks.sites import Site

WORDS = 50
TEXT_AXES = ("ids.0=batch", "ids.1=sequence", "mask.0=batch", "mask.1=sequence")
IMAGE_AXES = ("x.0=batch",)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One architecture.

    Args:
        build: makes the network.
        inputs: makes an example, by `forward`'s names.
        sites: what can die.
        dynamic: axes of free size.
        real: whether the example is what is verified on, as drawn inputs do not suit the network.
        drawn: whether weights are drawn anew; where not, the library's own initialisation stays.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    sites: Sequence[Site]
    dynamic: tuple[str, ...] = ()
    real: bool = False
    drawn: bool = True


class Taken(nn.Module):
    """A model of the library with one of its outputs."""

    def __init__(self, model: nn.Module, output: str = "last_hidden_state", **fixed: Any) -> None:
        super().__init__()
        self.model, self.output, self.fixed = model, output, fixed

    def call(self, **inputs: Any) -> torch.Tensor:
        """Run the model and take the output."""
        found: torch.Tensor = getattr(self.model(**inputs, **self.fixed), self.output)
        return found


class Text(Taken):
    """Token ids and their mask."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        return self.call(input_ids=ids, attention_mask=mask)


class Ids(Taken):
    """Token ids alone."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        return self.call(input_ids=ids)


class Pair(Taken):
    """Token ids for an encoder and for a decoder."""

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        return self.call(input_ids=ids, decoder_input_ids=targets)


class Pixels(Taken):
    """Images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        return self.call(pixel_values=x)


class Waves(Taken):
    """Sound."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        return self.call(input_values=x)


def _made(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    import transformers  # noqa: PLC0415 - slow

    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return made


def library(
    wrapper: type[Taken],
    name: str,
    sites: Sequence[Site],
    inputs: Callable[[], dict[str, torch.Tensor]],
    *,
    dynamic: tuple[str, ...] = (),
    model: str = "Model",
    output: str = "last_hidden_state",
    fixed: dict[str, Any] | None = None,
    drawn: bool = True,
    config: str = "",
    **settings: Any,
) -> Entry:
    """Make an entry for a network of the transformers library, by the name that its classes begin with."""

    def build() -> nn.Module:
        return wrapper(_made(name + model, config or f"{name}Config", settings), output, **(fixed or {}))

    return Entry(build, inputs, sites, dynamic, drawn=drawn)


def text_inputs() -> dict[str, torch.Tensor]:
    """Return two sequences of tokens, the second one padded."""
    random = torch.Generator().manual_seed(1)
    mask = torch.ones((2, 12), dtype=torch.long)
    mask[1, 7:] = 0
    return {"ids": torch.randint(3, WORDS, (2, 12), generator=random), "mask": mask}


def id_inputs() -> dict[str, torch.Tensor]:
    """Return two sequences of tokens."""
    return {"ids": text_inputs()["ids"]}


def pair_inputs() -> dict[str, torch.Tensor]:
    """Return sequences for an encoder and a decoder."""
    random = torch.Generator().manual_seed(2)
    return {**id_inputs(), "targets": torch.randint(3, WORDS, (2, 9), generator=random)}


def images(*shape: int) -> Callable[[], dict[str, torch.Tensor]]:
    """Make what draws images (or sounds) of a shape."""
    return lambda: {"x": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
