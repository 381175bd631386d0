"""The main job: read, remove what is dead, simplify, verify, write."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etp_deploy import __version__
from etp_deploy.errors import UsageError, VerificationError
from etp_deploy.files import check_output
from etp_deploy.inputs import given_inputs, input_specs
from etp_deploy.modelfile import keeps_weights_outside, move_model, read_model, write_model
from etp_deploy.simplify import Simplifier
from etp_deploy.sizes import ModelSizes, model_sizes
from etp_deploy.surgery.duplicates import merge_duplicates as merge
from etp_deploy.surgery.plan import Layer, plan
from etp_deploy.surgery.policy import alignment_fill
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.residuals import Partial, shrink_branches
from etp_deploy.surgery.residuals import partial_residuals as read_partial
from etp_deploy.surgery.rewrite import restore_interface, rewrite
from etp_deploy.surgery.thresholds import newly_dead, with_zeros
from etp_deploy.verification import Verification
from etp_deploy.verification import verify as verify_models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Fill

# what the report tries when channels lie just below it
HINT_THRESHOLD = 1e-6


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
    merged: int = 0

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
        document["merged_duplicates"] = self.merged
        return document


def compress(
    source: Path | str,
    destination: Path | str,
    *,
    align: str | int = "auto",
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
            "auto" does what ONNX Runtime's kernels want.
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
    fill, partial = alignment_fill(align), read_partial(partial_residuals, align)
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
        candidate, reference = Path(folder) / "candidate.onnx", source
        with job.stage("threshold"):
            nearly = newly_dead(original, HINT_THRESHOLD)
            model = with_zeros(original, zero_below) if zero_below else original
            if zero_below and verify:
                reference = Path(folder) / "reference.onnx"
                write_model(model, reference, external_data=keeps_weights_outside(original))
        with job.stage("prepare"):
            prepared = prepare(model)
            before = model_sizes(original, source, prepared.graph)
        merged = 0
        if merge_duplicates:
            with job.stage("merge"):
                merged = merge(prepared)
        result, rows = _shrink(prepared, model, job, fill, partial)
        metadata = {"etp_deploy.version": __version__, "etp_deploy.removed": _in_words(_removed(rows))}
        with job.stage("write"):
            outside = keeps_weights_outside(original)
            write_model(result, candidate, metadata=metadata, external_data=outside)
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
        merged=merged,
    )


def _shrink(
    prepared: ir.Model, model: ir.Model, job: _Job, fill: Fill | None, partial: Partial | None
) -> tuple[ir.Model, tuple[Layer, ...]]:
    """Plan and rewrite; return the model itself where nothing can go."""
    result = model
    with job.stage("plan"):
        removal, _ = plan(prepared.graph, fill)
    if removal.edits:
        with job.stage("rewrite"):
            rewrite(prepared, removal.edits)
            restore_interface(prepared, model)
            result = prepared
    if partial is not None:
        with job.stage("residuals"):
            more = shrink_branches(result, removal.layers, partial, fill)
            if more is not None:
                result, removal, _ = more
                rewrite(result, removal.edits)
                restore_interface(result, model)
    return result, removal.layers


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
