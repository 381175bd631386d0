"""Whether two models compute the same, by running both in ONNX Runtime; closed in every case of doubt.

Both run on inputs drawn to the original's real ranges, for several seeds and several sizes of what is dynamic,
or on given ones, with graph optimisation off and on. Sizes that the original itself refuses are left out and
named.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from etp_deploy.comparing import ATOL, RTOL, Difference, difference, format_rtol
from etp_deploy.errors import ModelError, UsageError
from etp_deploy.input_ranges import with_subgraphs
from etp_deploy.inputs import input_specs
from etp_deploy.sessions import open_session, provider_name, run_session
from etp_deploy.trials import given_trials, plan_trials
from etp_deploy.worker import isolated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from etp_deploy.inputs import InputSpec
    from etp_deploy.trials import Trial

_Outputs = dict[str, Any]
# a model that differs from itself by more than this share of an output's scale is not believed
LARGEST_NOISE = 1e-2
# another order of summation may round this many times worse than the two that were compared
NOISE_MARGIN = 4
# how often the last bits of the inputs are drawn anew
NUDGES = 4


@dataclasses.dataclass(frozen=True)
class Verification:
    """The answer of `verify`, with what it rests on.

    Args:
        passed: whether the two models agreed on everything that was tried.
        reason: why not, one line; empty when passed.
        max_abs_error: largest absolute difference of any output; infinite where something was not comparable.
        max_rel_error: largest difference relative to its output's scale (see `etp_deploy.comparing`).
        noise_abs: largest absolute difference of the original to itself, graph optimisation on against off.
        noise_rel: the same relative to the scale: the rounding that the model has anyway.
        rtol: the relative tolerance applied.
        atol: the absolute tolerance applied.
        samples: how many inputs were compared, with and without graph optimisation.
        seeds: the seeds of their random numbers; none where the inputs were given.
        shapes: the input shapes tried, each as {input: shape}.
        notes: what the reader should know: sizes that the original refuses.
        provider: the execution provider both ran on.
    """

    passed: bool
    reason: str
    max_abs_error: float
    max_rel_error: float
    noise_abs: float
    noise_rel: float
    rtol: float
    atol: float
    samples: int
    seeds: tuple[int, ...]
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    notes: tuple[str, ...]
    provider: str

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON values; what is not finite becomes null."""
        document = dataclasses.asdict(self)
        for key, value in document.items():
            if isinstance(value, float) and not math.isfinite(value):
                document[key] = None
        document["seeds"] = list(self.seeds)
        document["shapes"] = [{name: list(shape) for name, shape in shapes.items()} for shapes in self.shapes]
        document["notes"] = list(self.notes)
        return document


def verify(
    original: Path | str,
    result: Path | str,
    *,
    samples: int = 3,
    seed: int = 0,
    rtol: float = RTOL,
    atol: float = ATOL,
    provider: str = "cpu",
    dims: Mapping[str, int] | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    timeout_s: float = 600.0,
) -> Verification:
    """Run two models on the same inputs and compare every output.

    Passed means `|a - b| <= atol + rtol * scale` for every value of every output, where the scale is the
    largest magnitude in the original's output; integers, booleans and text equal; NaN and infinities at the
    same places; the same inputs and outputs declared. A model that computes in float16 or bfloat16 is held to
    four units of that format's last place instead of a tighter `rtol`. One that changes more itself, optimised against
    not or as the last bits of its inputs change, is held to four times that, and a note says so.

    Args:
        original: the model that is right.
        result: the model to compare.
        samples: how many inputs at the default sizes; other sizes get one each.
        seed: of the first; the others count up.
        rtol: allowed error relative to the scale.
        atol: allowed absolute error.
        provider: "cpu", "cuda" or a name that ONNX Runtime uses.
        dims: fixed sizes for dynamic dimensions, by name or as "input.axis".
        inputs: an array for each input, to run on instead of drawn ones; along a dynamic batch its samples
            run alone, too.
        timeout_s: wall-clock limit in seconds for all runs together.

    Raises:
        ModelError: when a file cannot be read as a model.
        UsageError: when an option makes no sense.
        ProviderError: when the provider is not available.
    """
    from etp_deploy.modelfile import read_model  # noqa: PLC0415 - the worker process can do without its weight

    _check_options(samples=samples, rtol=rtol, atol=atol)
    if inputs is not None and dims:
        raise UsageError("given inputs have their sizes", where=", ".join(dims), hint="give one of both")
    models = read_model(original), read_model(result)
    provider_name(provider)
    specs = input_specs(original)
    trials = (
        plan_trials(specs, samples=samples, seed=seed, dims=dims)
        if inputs is None
        else given_trials(specs, inputs, samples=samples)
    )
    rtol = max(rtol, _model_rtol(original))
    settings = {"rtol": rtol, "atol": atol, "provider": provider}
    mismatch = _interface_mismatch(*models)
    if mismatch:
        return _failed(mismatch, settings)
    try:
        answer: Verification = isolated(
            "etp_deploy.verification:_verify",
            str(original),
            str(result),
            trials,
            settings,
            timeout_s=timeout_s,
        )
    except ModelError as error:
        return _failed(str(error), settings)
    return answer


def _check_options(*, samples: int, rtol: float, atol: float) -> None:
    if samples < 1:
        raise UsageError(f"{samples} samples verify nothing", where="samples", hint="give 1 or more")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"a tolerance of {value} cannot be meant", where=name, hint="give 0 or more")


def _model_rtol(path: Path | str) -> float:
    """Return the tolerance that the narrowest floating-point type a model computes in calls for.

    Weights that are only stored narrow (all their readers are Cast) do not count.
    """
    graphs = list(with_subgraphs(onnx.load(path, load_external_data=False).graph))
    nodes = [node for graph in graphs for node in graph.node]
    computing = {name for node in nodes if node.op_type != "Cast" for name in node.input}
    types = [tensor.data_type for graph in graphs for tensor in graph.initializer if tensor.name in computing]
    types += [v.type.tensor_type.elem_type for graph in graphs for v in graph.input if v.name in computing]
    types += [a.i for node in nodes if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return max(
        (format_rtol(onnx.helper.tensor_dtype_to_np_dtype(t)) for t in types if t in narrow), default=0.0
    )


def _failed(reason: str, settings: Mapping[str, Any], **known: Any) -> Verification:
    """Return the answer no, with infinite errors where none was measured."""
    fields: dict[str, Any] = {
        "max_abs_error": math.inf,
        "max_rel_error": math.inf,
        "noise_abs": math.inf,
        "noise_rel": math.inf,
        "samples": 0,
        "seeds": (),
        "shapes": (),
        "notes": (),
    }
    return Verification(passed=False, reason=reason, **{**fields, **settings, **known})


def _verify(original: str, result: str, trials: Sequence[Trial], settings: dict[str, Any]) -> Verification:
    """Run and compare; called in the worker process.

    One session exists at a time, as each may hold a copy of all weights.
    """
    specs, provider = input_specs(original), settings["provider"]
    runs = {level: _run_all(original, specs, trials, level, provider) for level in (False, True)}
    kept = [i for i in range(len(trials)) if not any(isinstance(runs[level][i], str) for level in runs)]
    notes = _skipped(trials, runs)
    if not kept:
        refusal = next(r for level in runs for r in runs[level] if isinstance(r, str))
        return _failed(f"the original does not run: {refusal}", settings, notes=notes)
    trials = [trials[i] for i in kept]
    references = {level: [_outputs(runs[level][i]) for i in kept] for level in runs}
    # Twice in one session: random operators start each session from the same state.
    again = _outputs(_run_all(original, specs, [trials[0], trials[0]], False, provider)[1])
    others = {level: _run_all(result, specs, trials, level, provider) for level in (False, True)}
    noise = _compare_all(references[False], references[True], settings)
    if noise.reason and noise.max_rel <= LARGEST_NOISE:
        # The original computes no more exactly than this: optimised and not, it differs from itself.
        settings = {**settings, "rtol": max(settings["rtol"], NOISE_MARGIN * noise.max_rel)}
        notes = (
            *notes,
            f"rtol raised to {NOISE_MARGIN} times the original's own rounding, {noise.max_rel:.3g}",
        )
    reason = _doubt(references[False], again, settings)
    errors, unequal = _both_levels(references, others, settings)
    if unequal and not reason and max(error.max_rel for error in errors) <= LARGEST_NOISE:
        # It may still be as exact as the original, if the last bits of the inputs change as much.
        change = _last_bits(original, specs, trials, references[False], settings)
        if settings["rtol"] < NOISE_MARGIN * change <= NOISE_MARGIN * LARGEST_NOISE:
            settings = {**settings, "rtol": NOISE_MARGIN * change}
            errors, unequal = _both_levels(references, others, settings)
            notes = (
                *notes,
                f"rtol raised to {NOISE_MARGIN} times what the last bits of the inputs change, {change:.3g}",
            )
    reason = reason or unequal
    return Verification(
        passed=not reason,
        reason=reason,
        max_abs_error=max(error.max_abs for error in errors),
        max_rel_error=max(error.max_rel for error in errors),
        noise_abs=noise.max_abs,
        noise_rel=noise.max_rel,
        samples=len(trials),
        seeds=tuple(trial.seed for trial in trials if trial.seed is not None),
        shapes=_shapes(specs, trials),
        notes=notes,
        **settings,
    )


def _both_levels(
    references: Mapping[bool, Sequence[_Outputs]],
    others: Mapping[bool, Sequence[_Outputs | str]],
    settings: Mapping[str, Any],
) -> tuple[list[Difference], str]:
    """Return the differences of the plain and the optimised runs, and the first reason."""
    errors = [_compare_all(references[level], others[level], settings) for level in (False, True)]
    return errors, next((error.reason for error in errors if error.reason), "")


def _last_bits(
    path: str,
    specs: Sequence[InputSpec],
    trials: Sequence[Trial],
    references: Sequence[_Outputs],
    settings: Mapping[str, Any],
) -> float:
    """Return the largest relative change of an output as floating-point inputs move to one of their neighbours."""
    session = open_session(path, optimize=False, provider=settings["provider"])
    largest = 0.0
    for trial, reference in zip(trials, references, strict=True):
        feeds = trial.feeds(specs)
        for seed in range(NUDGES):
            rng = np.random.default_rng(seed)
            nudged = {name: _nudged(array, rng) for name, array in feeds.items()}
            found = _compare_all([reference], [run_session(session, nudged)], settings).max_rel
            largest = max(largest, found if math.isfinite(found) else 0.0)
    return largest


def _nudged(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an array with every entry that is float32 or float64 moved to a neighbour, up or down."""
    if array.dtype not in {np.dtype(np.float32), np.dtype(np.float64)}:
        return array
    ends = np.where(rng.random(array.shape) < 0.5, np.inf, -np.inf).astype(array.dtype)
    neighbours: np.ndarray = np.nextafter(array, ends)
    return neighbours


def _run_all(
    path: str, specs: Sequence[InputSpec], trials: Sequence[Trial], optimize: bool, provider: str
) -> list[_Outputs | str]:
    """Run a model on every trial; where it refuses, why."""
    try:
        session = open_session(path, optimize=optimize, provider=provider)
    except ModelError as error:
        return [error.message for _ in trials]
    answers: list[_Outputs | str] = []
    for trial in trials:
        try:
            answers.append(run_session(session, trial.feeds(specs)))
        except ModelError as error:
            answers.append(error.message)
    return answers


def _outputs(answer: _Outputs | str) -> _Outputs:
    """Return what a run gave; one that refused gave no outputs."""
    return {} if isinstance(answer, str) else answer


def _compare_all(
    references: Sequence[_Outputs], others: Sequence[_Outputs | str], settings: Mapping[str, Any]
) -> Difference:
    """Return the largest difference over all trials and outputs, with the first reason."""
    worst = Difference(0.0, 0.0, "")
    for reference, other in zip(references, others, strict=True):
        if isinstance(other, str):
            return Difference(math.inf, math.inf, f"the result does not run: {other}")
        for name, array in reference.items():
            found = difference(array, other.get(name), rtol=settings["rtol"], atol=settings["atol"])
            reason = f"output {name!r} {found.reason}" if found.reason else ""
            worst = Difference(
                max(worst.max_abs, found.max_abs), max(worst.max_rel, found.max_rel), worst.reason or reason
            )
    return worst


def _doubt(references: Sequence[_Outputs], again: _Outputs, settings: Mapping[str, Any]) -> str:
    """Return why agreement would prove nothing; empty when it does."""
    if _compare_all(references[:1], [again], settings).reason:
        return "the original is not deterministic: two runs on the same input differ"
    arrays = {
        name: [r[name] for r in references if isinstance(r[name], np.ndarray)] for name in references[0]
    }
    for name, seen in arrays.items():
        if seen and not any(array.size for array in seen):
            return f"output {name!r} is empty for every input: there is nothing to compare"
        floating = all(array.dtype.kind in "fcV" for array in seen)
        if seen and floating and all(bool(np.isnan(array.astype(np.complex128)).all()) for array in seen):
            return f"output {name!r} is NaN everywhere: there is nothing to compare"
    return "" if arrays else "the models have no outputs"


def _skipped(trials: Sequence[Trial], runs: Mapping[bool, Sequence[_Outputs | str]]) -> tuple[str, ...]:
    """Name the sizes that the original itself refuses."""
    notes: dict[str, None] = {}
    for i, trial in enumerate(trials):
        refusals = [refusal for level in runs if isinstance(refusal := runs[level][i], str)]
        if refusals:
            sizes = ", ".join(f"{name}={size}" for name, size in trial.dims.items()) or "the declared sizes"
            notes[f"skipped {sizes}: the original does not run there ({refusals[0]})"] = None
    return tuple(notes)


def _shapes(specs: Sequence[InputSpec], trials: Sequence[Trial]) -> tuple[dict[str, tuple[int, ...]], ...]:
    shapes: list[dict[str, tuple[int, ...]]] = []
    for trial in trials:
        sizes = {name: array.shape for name, array in trial.feeds(specs).items()}
        if sizes not in shapes:
            shapes.append(sizes)
    return tuple(shapes)


def _interface_mismatch(original: ir.Model, result: ir.Model) -> str:
    """Return how the declared inputs and outputs differ; empty when a caller could swap the files."""
    for kind in ("input", "output"):
        ours, theirs = (_declared(model, kind) for model in (original, result))
        if list(ours) != list(theirs):
            return f"the {kind}s are {list(theirs)} instead of {list(ours)}"
        for name in ours:
            (dtype, shape), (other_dtype, other_shape) = ours[name], theirs[name]
            if dtype != other_dtype:
                return f"{kind} {name!r} is {other_dtype} instead of {dtype}"
            if not _shapes_agree(shape, other_shape, strict=kind == "input"):
                return f"{kind} {name!r} is declared {other_shape} instead of {shape}"
    return ""


def _declared(model: ir.Model, kind: str) -> dict[str, tuple[str, list[int | None] | None]]:
    """Return type and sizes by name: None for a dynamic size, and for a shape that is not declared."""
    graph = model.graph
    values = (
        [v for v in graph.inputs if v.name not in graph.initializers] if kind == "input" else graph.outputs
    )
    described = {}
    for value in values:
        sizes = None if value.shape is None else [d if isinstance(d, int) else None for d in value.shape]
        described[value.name or ""] = (str(value.type), sizes)
    return described


def _shapes_agree(ours: list[int | None] | None, theirs: list[int | None] | None, *, strict: bool) -> bool:
    """Whether declared shapes agree; outputs may be declared more or less exactly, as runs show them."""
    if ours is None or theirs is None:
        return ours is theirs or not strict
    return len(ours) == len(theirs) and all(
        a == b or (not strict and None in (a, b)) for a, b in zip(ours, theirs, strict=True)
    )
