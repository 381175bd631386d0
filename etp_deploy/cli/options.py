"""Kinds of option values that several commands take, checked while the command line is read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = click.Path(path_type=Path)


def _align(text: str) -> str | int:
    if text in {"auto", "off"}:
        return text
    if re.fullmatch(r"\d{1,6}", text) and int(text) > 0:
        return int(text)
    raise click.BadParameter(f"{text!r} is none of auto, off or a positive number.")


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number < 1:
        raise click.BadParameter(f"{text!r} is no share of a layer's largest weight, 0 or more and below 1.")
    return number


def tolerance(text: str) -> float:
    """Read a finite number of 0 or more."""
    number = _number(text)
    if not (number >= 0 and math.isfinite(number)):
        raise click.BadParameter(f"{text!r} is no tolerance; give a number of 0 or more.")
    return number


def counts(least: int) -> Callable[[str], list[int]]:
    """Make a reader of numbers with commas between them."""

    def read(text: str) -> list[int]:
        parts = text.split(",")
        if not all(re.fullmatch(r"\s*\d{1,9}\s*", part) and int(part) >= least for part in parts):
            raise click.BadParameter(f"{text!r} is no list of numbers of {least} or more, such as 1,2.")
        return [int(part) for part in parts]

    return read


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.rpartition("=")
    if not name or not re.fullmatch(r"\d{1,9}", size) or int(size) < 1:
        raise click.BadParameter(f"{text!r} is no size; write NAME=N with N of 1 or more.")
    return name, int(size)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def align(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--align`."""
    return click.option(
        "--align",
        type=_align,
        metavar="auto|off|N",
        default="auto",
        show_default=True,
        help="off: remove all that is dead; N: keep convolutions' channel counts at multiples of N; "
        "auto: what the target's kernels are fast at; compress measures that for the host.",
    )(command)


def target(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--target`."""
    return click.option(
        "--target",
        type=click.Choice(("host", "cpu-avx2", "cpu-avx512", "arm64", "cuda", "none")),
        default="host",
        show_default=True,
        help="What --align auto plans for: this machine, or another by rule.",
    )(command)


def zero_below(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--zero-below`."""
    return click.option(
        "--zero-below",
        type=_share,
        metavar="R",
        default="0",
        show_default="exact zeros only",
        help="Take weights below R times their layer's largest for zero.",
    )(command)


def merge_duplicates(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--merge-duplicates`."""
    text = "Let one channel stand for all that are multiples of it."
    return click.option("--merge-duplicates", is_flag=True, help=text)(command)


def partial_residuals(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--partial-residuals`."""
    return click.option(
        "--partial-residuals",
        type=click.Choice(["off", "auto", "always"]),
        default="off",
        show_default=True,
        help="Shrink branches that add nothing to some channels of their residual, and pad what they add; "
        "auto: where that was measured to pay.",
    )(command)


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`."""
    text = "Print one JSON document on stdout; tables go to stderr."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def sizes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--shape`."""
    text = "Size of a dynamic dimension, by its name or as INPUT.AXIS; may be repeated."
    return click.option("--shape", "shapes", type=_size, metavar="NAME=N", multiple=True, help=text)(command)


def inputs(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make what adds `--inputs`, with what the command does with them."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        return click.option("--inputs", type=PATH, metavar="FILE", help=text)(command)

    return add
