"""The main job: read, remove what is dead, simplify, verify, write."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etp_deploy import __version__
from etp_deploy.errors import ModelError, UsageError, VerificationError
from etp_deploy.files import check_output
from etp_deploy.inputs import given_inputs, input_specs
from etp_deploy.modelfile import keeps_weights_outside, move_model, read_model, write_model
from etp_deploy.simplify import Simplifier
from etp_deploy.sizes import ModelSizes, model_sizes
from etp_deploy.surgery.duplicates import merge_duplicates as merge
from etp_deploy.surgery.plan import Layer, RemovalPlan, plan
from etp_deploy.surgery.policy import HOST, Target, alignment, multiple_fill
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.residuals import partial_residuals as read_partial
from etp_deploy.surgery.residuals import shrink_branches
from etp_deploy.surgery.rounds import carry_out
from etp_deploy.surgery.thresholds import newly_dead, with_zeros
from etp_deploy.tuning import fastest, measured, planned_for
from etp_deploy.verification import Verification
from etp_deploy.verification import verify as verify_models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    import onnx_ir as ir


# what the report tries when channels lie just below it
HINT_THRESHOLD = 1e-6


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Which alignment was used.

    Attributes:
        target: the name of the target planned for.
        used: "off", or the number whose multiples channel counts are.
        times: where it was measured: each candidate's time against that of the first.
    """

    target: str
    used: str
    times: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
        source: the file read.
        destination: the file written.
        before: sizes of the original.
        after: sizes of the result.
        layers: one row for each layer that could shrink.
        verification: how the two were compared; None where that was switched off.
        seconds: wall-clock time by stage.
        zero_below: the relative threshold that was used.
        nearly_dead: how many more output channels a threshold of 1e-6 would make dead.
        simplified: whether onnxsim's result was kept.
        alignment: which alignment was used, and why.
        merged: how many channels another stands for, being multiples of it.
    """

    source: str
    destination: str
    before: ModelSizes
    after: ModelSizes
    layers: tuple[Layer, ...]
    verification: Verification | None
    seconds: dict[str, float]
    zero_below: float
    nearly_dead: int
    simplified: bool
    alignment: Alignment
    merged: int

    @property
    def removed(self) -> dict[str, int]:
        """How many channels, heads and neurons went."""
        return _removed(self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        before, after = dataclasses.asdict(self.before), dataclasses.asdict(self.after)
        document: dict[str, Any] = {
            "schema": "etp-deploy/compress/1",
            "source": self.source,
            "destination": self.destination,
        }
        for name in ("parameters", "bytes", "macs", "nodes"):
            document[name] = {"before": before[name], "after": after[name]}
        document["removed"] = {
            **self.removed,
            "by_axis": [
                {"tensor": row.name, "kind": row.kind, "before": row.total, "after": row.kept}
                for row in self.layers
                if row.removed
            ],
        }
        document["kept_dead"] = [
            {"tensor": row.name, "count": count, "reason": text}
            for row in self.layers
            for text, count in row.reasons
        ]
        document["layers"] = [dataclasses.asdict(row) for row in self.layers]
        document["verification"] = None if self.verification is None else self.verification.to_json()
        document["seconds"] = self.seconds
        document["zero_below"] = {"used": self.zero_below, "at_1e-6_more_dead_channels": self.nearly_dead}
        document["simplified"] = self.simplified
        document["alignment"] = dataclasses.asdict(self.alignment)
        document["merged_duplicates"] = self.merged
        return document


def compress(
    source: Path | str,
    destination: Path | str,
    *,
    align: str | int = "auto",
    target: str = HOST,
    zero_below: float = 0.0,
    merge_duplicates: bool = False,
    partial_residuals: str | bool = False,
    verify: bool = True,
    simplify: bool = True,
    inputs: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[str], None] | None = None,
) -> CompressionReport:
    """Remove every dead channel, head and neuron of an ONNX model exactly, and write the result.

    Args:
        source: the model; it is never changed.
        destination: where the result appears, whole or not at all.
        align: "off" removes all that is dead; a number keeps channel counts of convolutions at its multiples;
            "auto" does what the target's kernels want.
        target: what to plan for: a name in `surgery.policy.TARGETS`, or "host" for this machine, on which "auto"
            measures what is fastest.
        zero_below: weights below this share of their layer's largest count as zero.
        merge_duplicates: let one channel stand for all that are multiples of it.
        partial_residuals: shrink branches that add nothing to some channels of their residual: "always", or True
            where that pays.
        verify: compare original and result before anything is written.
        simplify: run onnxsim, and keep its result if it is no worse.
        inputs: an array for each input, to compare on instead of drawn ones.
        progress: called with the name of each stage as it begins.

    Raises:
        ModelError: when the source cannot be read as a model.
        OutputError: when the destination cannot be written.
        UsageError: when an option makes no sense.
        VerificationError: when original and result differ; nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    if not 0 <= zero_below < 1:
        raise UsageError(
            "the threshold is a share of a layer's largest weight", where=str(zero_below), hint="0 to 1"
        )
    if inputs is not None and not verify:
        raise UsageError("nothing runs on the inputs", where="inputs", hint="verify, or leave them out")
    planned = planned_for(target)
    multiple = alignment(align, planned)
    # an option that makes no sense is refused before anything is read
    read_partial(partial_residuals, multiple)
    job = _Job(progress)
    with job.stage("read"):
        original = read_model(source)
        if inputs is not None:
            inputs = given_inputs(input_specs(source), inputs)
        check_output(destination, inputs=(source,))
    with ExitStack() as stack:
        simplifier = stack.enter_context(Simplifier()) if simplify else None
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.")
        )
        reference, outside = source, keeps_weights_outside(original)
        with job.stage("threshold"):
            nearly = newly_dead(original, HINT_THRESHOLD)
            model = with_zeros(original, zero_below) if zero_below else original
            if zero_below and verify:
                reference = Path(folder) / "reference.onnx"
                write_model(model, reference, external_data=outside)
        shrinking = _Shrinking(
            model,
            Path(folder),
            job,
            merge_duplicates=merge_duplicates,
            partial_residuals=partial_residuals,
            outside=outside,
        )
        prepared = shrinking.prepared()
        before = model_sizes(original, source, prepared.graph)
        if align == "auto" and target == HOST:
            candidate, rows, chosen = _tuned(shrinking, prepared, planned, inputs)
        else:
            candidate, rows = shrinking.written(prepared, shrinking.planned(prepared, multiple), multiple)
            chosen = Alignment(planned.name, _multiple_name(multiple))
        kept_simpler = False
        if simplifier is not None:
            with job.stage("simplify"):
                kept_simpler = simplifier.simplified(candidate)
        verification = None
        if verify:
            with job.stage("verify"):
                verification = _verified(reference, candidate, source, inputs)
        with job.stage("write"):
            move_model(candidate, destination, inputs=(source,))
    written = read_model(destination)
    return CompressionReport(
        source=str(source),
        destination=str(destination),
        before=before,
        after=model_sizes(written, destination),
        layers=rows,
        verification=verification,
        seconds=job.seconds,
        zero_below=zero_below,
        nearly_dead=nearly,
        simplified=kept_simpler,
        alignment=chosen,
        merged=shrinking.merged,
    )


class _Shrinking:
    """Writes what is left of one model under different alignments, each into a file of its own."""

    def __init__(
        self,
        model: ir.Model,
        folder: Path,
        job: _Job,
        *,
        merge_duplicates: bool,
        partial_residuals: str | bool,
        outside: bool,
    ) -> None:
        self.model, self.folder, self.job, self.outside = model, folder, job, outside
        self.merge_duplicates, self.partial_residuals = merge_duplicates, partial_residuals
        self.merged = 0

    def prepared(self) -> ir.Model:
        """Return the model in the form that is planned on and rewritten."""
        with self.job.stage("prepare"):
            prepared = prepare(self.model)
        if self.merge_duplicates:
            with self.job.stage("merge"):
                self.merged = merge(prepared)
        return prepared

    def planned(self, prepared: ir.Model, multiple: int) -> RemovalPlan:
        """Return what goes under an alignment."""
        with self.job.stage("plan"):
            return plan(prepared.graph, multiple_fill(multiple))[0]

    def written(
        self, prepared: ir.Model, removal: RemovalPlan, multiple: int
    ) -> tuple[Path, tuple[Layer, ...]]:
        """Rewrite a prepared model, which is used up, and write it; the model itself where nothing can go."""
        fill, partial = multiple_fill(multiple), read_partial(self.partial_residuals, multiple)
        with self.job.stage("rewrite"):
            rest = carry_out(prepared, removal, self.model, fill)
        if partial is not None:
            with self.job.stage("residuals"):
                more = shrink_branches(rest.model, rest.layers, partial, fill)
                if more is not None:
                    rest = carry_out(more[0], more[1], self.model, fill)
        path = self.folder / f"candidate{multiple}.onnx"
        removed = _in_words(_removed(rest.layers))
        metadata = {"etp_deploy.version": __version__, "etp_deploy.removed": removed}
        with self.job.stage("write"):
            write_model(rest.model, path, metadata=metadata, external_data=self.outside)
        return path, rest.layers


def _tuned(
    shrinking: _Shrinking, prepared: ir.Model, target: Target, inputs: Mapping[str, np.ndarray] | None
) -> tuple[Path, tuple[Layer, ...], Alignment]:
    """Write a candidate for each multiple that makes a difference, and choose the fastest on this machine."""
    made: dict[int, tuple[Path, tuple[Layer, ...]]] = {}
    for multiple in target.multiples:
        fresh = shrinking.prepared() if made else prepared
        removal = shrinking.planned(fresh, multiple)
        if any(_counts(removal.layers) == _counts(rows) for _, rows in made.values()):
            continue
        made[multiple] = shrinking.written(fresh, removal, multiple)
        if not any(row.kind == "channels" and row.removed for row in removal.layers):
            break  # nothing that alignment is for
    multiples = list(made)
    if len(made) == 1:
        return *made[multiples[0]], Alignment(target.name, _multiple_name(multiples[0]))
    with shrinking.job.stage("tune"):
        try:
            ratios = measured([path for path, _ in made.values()], inputs)
        except ModelError:  # it does not run on drawn inputs; verification will say so
            chosen = target.rule if target.rule in made else multiples[0]
            return *made[chosen], Alignment(target.name, _multiple_name(chosen))
    chosen = multiples[fastest(ratios)]
    times = {_multiple_name(item): ratio for item, ratio in zip(multiples, ratios, strict=True)}
    return *made[chosen], Alignment(target.name, _multiple_name(chosen), times)


def _counts(rows: tuple[Layer, ...]) -> list[int]:
    return [row.kept for row in rows]


def _multiple_name(multiple: int) -> str:
    return "off" if multiple == 1 else str(multiple)


def _verified(
    reference: Path, candidate: Path, source: Path, inputs: Mapping[str, np.ndarray] | None
) -> Verification:
    """Compare the two; a disagreement ends the job."""
    verification = verify_models(reference, candidate, inputs=inputs)
    if not verification.passed:
        unseen = inputs is None and not verification.samples
        advice = (
            "give real inputs (--inputs) if drawn ones do not suit it"
            if unseen
            else "please report the model"
        )
        raise VerificationError(
            f"the compressed model does not agree with the original: {verification.reason}",
            where=str(source),
            hint=f"nothing was written; {advice}",
        )
    return verification


def _removed(rows: tuple[Layer, ...]) -> dict[str, int]:
    counts = {"channels": 0, "heads": 0, "neurons": 0}
    for row in rows:
        if row.kind in counts:
            counts[row.kind] += row.removed
    return counts


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


class _Job:
    """Times the stages and tells of them."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage under a name; a name that comes again adds up."""
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
