"""Bring a model into the form that the analysis reads.

Functions are inlined, constants become initializers, stale shape annotations are dropped and inferred anew
(symbolically, by `onnx-shape-inference`), and subgraphs that compute shapes (`Shape -> Gather -> Concat ->
Reshape`, which exporters write for dynamic sizes) are replaced by what they compute, so that no size that the
surgery changes is read back from a tensor.
"""

from __future__ import annotations

import logging
import re
from functools import partial

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx_shape_inference import ShapeInferenceError, infer_symbolic_shapes

import etp_deploy.surgery.fused_shapes
import etp_deploy.surgery.quantized_shapes  # noqa: F401 - teaches shape inference
from etp_deploy.errors import ModelError
from etp_deploy.surgery.absorb import (
    absorb_padding,
    expand_tiles,
    name_squeezed_axes,
    omit_expansions,
    omit_zero_states,
    open_ends,
)
from etp_deploy.surgery.boundaries import (
    forget_body_inputs,
    forget_shapes,
    give_up_all,
    has_bodies,
    hide_unknown,
    name_apart,
    note_undeclared,
    open_bodies,
    open_copies,
    open_returns,
    own_initializers,
    rebind,
    remove_unused,
)
from etp_deploy.surgery.copies import part_copies
from etp_deploy.surgery.equations import spell_out
from etp_deploy.surgery.fusions import take_apart
from etp_deploy.surgery.projections import open_projections
from etp_deploy.surgery.resolve import constant, fill_shapes, fold_integers, resolve_shapes, shape_data
from etp_deploy.surgery.stored import unpack

# from here on an initializer among the inputs is a default that a caller may override
OVERRIDABLE_IR_VERSION = 4


def prepare(model: ir.Model) -> ir.Model:
    """Return an equivalent model that the analysis can read; the given one is left alone.

    Weights are shared between the two, not copied.
    """
    model = model.clone()
    _drop_annotations(model)
    _drop_initializer_inputs(model)
    passes.InlinePass()(model)
    note_undeclared(model)
    own_initializers(model)
    open_returns(model)
    for simplify in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        # the pass cannot handle an Identity that ends a body
        *(() if has_bodies(model) else (passes.IdentityEliminationPass(),)),
    ):
        simplify(model)
    remove_unused(model)
    name_apart(model)
    take_apart(model.graph, constant)
    open_bodies(model)
    open_copies(model.graph)
    forget_body_inputs(model)
    unpack(model.graph, constant)
    open_ends(model.graph, constant)
    changed = True
    while changed:  # a resolved target makes more shapes known, which may resolve more
        infer_shapes(model)
        changed = fold_integers(model.graph) | resolve_shapes(model.graph) | fill_shapes(model.graph)
        remove_unused(model)
    graph = model.graph
    name_squeezed_axes(graph, constant)
    if open_projections(graph, partial(constant, graph)):
        remove_unused(model)
        infer_shapes(model)
    absorbed = absorb_padding(graph) | omit_zero_states(graph) | omit_expansions(graph, shape_data)
    if absorbed | expand_tiles(graph) | spell_out(graph):
        remove_unused(model)
    part_copies(graph)
    return model


def infer_shapes(model: ir.Model) -> None:
    """Infer all shapes in place, symbolic where dynamic.

    Raises:
        ModelError: where shapes contradict each other.
    """
    again = True
    while again:
        try:
            _infer_once(model)
        except ModelError:
            # in a loop's body they may contradict only what was assumed of its state
            if not give_up_all(model):
                raise
        else:
            again = rebind(model)
    hide_unknown(model)


def _infer_once(model: ir.Model) -> None:
    logger = logging.getLogger("onnx_shape_inference")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # names that outputs declare for sizes tell nothing that removing channels needs, and cost most of the time
        infer_symbolic_shapes(model, warn_on_missing=False, adopt_declared_symbols=False)
    except ShapeInferenceError as error:
        raise ModelError(
            f"its shapes contradict each other: {str(error).splitlines()[0]}", hint="check the model"
        ) from error
    finally:
        logger.setLevel(level)


def _drop_initializer_inputs(model: ir.Model) -> None:
    """Take initializers off the inputs where the format demanded them there (IR version 3 and before)."""
    if model.ir_version >= OVERRIDABLE_IR_VERSION:
        return
    for value in [value for value in model.graph.inputs if value.name in model.graph.initializers]:
        model.graph.inputs.remove(value)
    model.ir_version = OVERRIDABLE_IR_VERSION


def _drop_annotations(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_clean(dim) for dim in value.shape])
    forget_shapes(model)


def _clean(dim: int | ir.SymbolicDim) -> int | str | None:
    """Return a dimension whose name, if it has one, is an identifier (TorchScript writes others).

    PaddlePaddle writes -1 and "?" for sizes that it does not know; two of these need not be equal.
    """
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    if dim.value is None or not re.search(r"[^\W\d]", dim.value):
        return None
    return dim.value if dim.value.isidentifier() else re.sub(r"\W", "_", f"dim_{dim.value}")
