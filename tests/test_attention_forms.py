"""Every form of attention comes out equal, and with exactly the weights of the block that is built smaller."""

from __future__ import annotations

import numpy as np
import pytest
from attention_blocks import FORMS, SHARING, TOKENS, Block, Widths, case
from graphs import failure, shrunk, weight_elements
from onnx import helper

FULL = Widths()
# their kernels want one size, a multiple of eight, or their tables serve all heads
WHOLE_HEADS = [form for form in FORMS if form.startswith(("grouped", "rotary"))]
OPEN_HEADS = [form for form in FORMS if form not in WHOLE_HEADS]
# query and key heads of one size, value heads of another
TWO_SIZES = [form for form in OPEN_HEADS if form != "multihead-keys"]


def widths(form: str, groups: int = 4, per_group: int = 1) -> Widths:
    """Whole heads, of a size that the form can hold: GroupQueryAttention rotates sixteen at once."""
    size = 16 if form == "grouped-rotary" else 8
    return Widths(groups, per_group, size, size)


def assert_native(form: str, planted: Block, wanted: Widths, mask: np.ndarray | None = None) -> None:
    """The planted block computes the same when compressed, with as many weights as a block of these widths."""
    before = case(form, planted, mask)
    assert failure(before, floor=False) is None
    native = case(form, Block(wanted, cross=planted.cross, biased=planted.biased), mask).model
    assert weight_elements(shrunk(before.model)) == weight_elements(native) < weight_elements(before.model)


def assert_untouched(form: str, planted: Block) -> None:
    """Nothing goes."""
    before = case(form, planted)
    assert failure(before) is None
    assert weight_elements(shrunk(before.model)) == weight_elements(before.model)


# heads


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_nobody_reads(form):
    """Two heads whose rows of the out-projection are zero go from every projection."""
    block = Block(widths(form))
    block.w["o"][[1, 2]] = 0
    assert_native(form, block, widths(form, 2))


@pytest.mark.parametrize("form", FORMS)
def test_heads_of_zero_values(form):
    """Two heads whose values are zero throughout go."""
    block = Block(widths(form))
    block.w["v"][:, [0, 3]] = 0
    block.b["v"][[0, 3]] = 0
    assert_native(form, block, widths(form, 2))


@pytest.mark.parametrize(
    "form", [form for form in FORMS if not form.startswith(("grouped", "projecting-plain"))]
)
def test_heads_of_constant_values(form):
    """Weights of a row sum to one: values that are a live bias alone come out as they are, and are folded."""
    block = Block(widths(form))
    block.w["v"][:, [0, 3]] = 0
    assert_native(form, block, widths(form, 2))


@pytest.mark.parametrize("form", ["grouped", "grouped-packed"])
def test_constant_values_stay_where_rows_may_be_padding(form):
    """GroupQueryAttention promises nothing beyond a sequence's length, so only zero values are known there."""
    block = Block(widths(form))
    block.w["v"][:, [0, 3]] = 0
    assert_untouched(form, block)


@pytest.mark.parametrize("form", SHARING)
def test_query_heads_of_shared_keys(form):
    """A query head of each group goes, whichever it is, and a group as a whole."""
    block = Block(widths(form, 3, 3))
    block.w["o"][[0, 5, 6, 7, 8]] = 0
    assert_native(form, block, widths(form, 2, 2))


@pytest.mark.parametrize("form", SHARING)
def test_a_query_head_of_one_group_stays_for_the_others(form):
    """Groups keep equally many: one dead query head alone cannot go."""
    block = Block(widths(form, 3, 3))
    block.w["o"][4] = 0
    assert_untouched(form, block)


@pytest.mark.parametrize("form", SHARING)
def test_query_heads_of_one_key(form):
    """With one key and value head for all, any of the query heads may go."""
    block = Block(widths(form, 1, 5))
    block.w["o"][[0, 3]] = 0
    assert_native(form, block, widths(form, 1, 3))


# inside heads


@pytest.mark.parametrize("form", OPEN_HEADS)
def test_query_indices_at_other_places_in_each_head(form):
    """Queries and keys lose as many indices in every head; the scale stays what it was."""
    block = Block(FULL)
    for head in range(FULL.heads):
        block.w["q"][:, head, [head, head + 2]] = 0
        block.b["q"][head, [head, head + 2]] = 0
    if form == "multihead-keys":  # keys and values by head are of one size there
        assert_untouched(form, block)
        block.w["o"][:, :2] = 0
        assert_native(form, block, Widths(size=6, value_size=6))
    else:
        assert_native(form, block, Widths(size=6))


@pytest.mark.parametrize("form", TWO_SIZES)
def test_value_indices_at_other_places_in_each_head(form):
    """Values that are a live bias alone, and rows that the out-projection does not read, go inside heads."""
    block = Block(FULL)
    for head in range(FULL.heads):
        if form == "projecting-plain":
            block.w["o"][head, [head]] = 0
        block.w["v"][:, head, [head]] = 0
        block.w["o"][head, [head + 3]] = 0
    assert_native(form, block, Widths(value_size=6))


@pytest.mark.parametrize("form", [form for form in TWO_SIZES if form != "projecting-plain"])
def test_constant_keys_vanish_in_the_softmax(form):
    """A key that is the same at all positions adds one number to a row: it goes with its query."""
    block = Block(FULL)
    for head in range(FULL.heads):
        block.w["k"][:, head, [head, head + 1, head + 4]] = 0
    assert_native(form, block, Widths(size=5))


@pytest.mark.parametrize("form", TWO_SIZES)
def test_constant_queries_stay(form):
    """Negative control: a query that is the same everywhere weighs its key, which differs."""
    block = Block(FULL)
    block.w["q"][:, :, [1, 4]] = 0
    if form == "projecting-plain":
        block.w["q"][:, :, [1, 4]] = 1e-3
    assert_untouched(form, block)


@pytest.mark.parametrize("form", WHOLE_HEADS)
def test_indices_inside_heads_that_have_to_stay(form):
    """Rotated heads, and those of GroupQueryAttention, stay whole."""
    block = Block(widths(form))
    block.w["q"][:, :, 1] = 0
    block.b["q"][:, 1] = 0
    block.w["o"][:, 3] = 0
    if form.startswith("rotary"):  # their values are not rotated
        assert_native(form, block, Widths(value_size=7))
    else:
        assert_untouched(form, block)


def test_a_softcap_sees_constant_keys():
    """Negative control: behind a softcap a number added to a row does change the weights."""
    block = Block(FULL)
    block.w["k"][:, :, [2, 5]] = 0
    before = case("standard3", block)
    node = next(node for node in before.model.graph.node if node.op_type == "Attention")
    node.attribute.append(helper.make_attribute("softcap", 3.0))
    assert failure(before) is None
    assert weight_elements(shrunk(before.model)) == weight_elements(before.model)


# masks, lengths


@pytest.mark.parametrize(
    "shape", [(FULL.heads, TOKENS, TOKENS), (1, FULL.heads, TOKENS, TOKENS), (1, 1, TOKENS, TOKENS)]
)
@pytest.mark.parametrize("form", ["decomposed", "standard3", "standard4", "multihead", "projecting"])
def test_a_bias_of_each_head_loses_the_same_heads(form, shape):
    """A constant bias that holds something of each head is cut with the heads; one for all heads stays."""
    if form in {"multihead", "projecting"} and len(shape) < 4:
        shape = (1, *shape)
    mask = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    block = Block(FULL)
    block.w["o"][[0, 2]] = 0
    before = case(form, block, mask)
    assert failure(before, floor=False) is None
    smaller = mask[..., [1, 3], :, :] if FULL.heads in shape[:-2] else mask
    native = case(form, Block(Widths(groups=2)), smaller).model
    assert weight_elements(shrunk(before.model)) == weight_elements(native)


@pytest.mark.parametrize(
    "form", ["decomposed", "standard3", "standard4", "multihead", "multihead-bias", "multihead-keys"]
)
def test_keys_of_another_sequence(form):
    """Cross-attention with another length loses heads as self-attention does."""
    block = Block(FULL, cross=True)
    block.w["o"][1] = 0
    block.w["v"][:, 2] = 0
    assert_native(form, block, Widths(groups=2))


@pytest.mark.parametrize(
    ("mask", "goes"),
    [
        (np.tri(TOKENS, TOKENS, dtype=bool), True),
        (np.where(np.tri(TOKENS), 0, -np.inf).astype(np.float32), True),
        (np.tri(TOKENS, TOKENS, -1, dtype=bool), False),
    ],
)
def test_constant_values_under_a_known_mask(mask, goes):
    """Where every query sees a key constants come out; where one sees none the operator answers zero."""
    block = Block(FULL)
    block.w["v"][:, [0, 3]] = 0
    if goes:
        assert_native("standard3", block, Widths(groups=2), mask)
    else:
        before = case("standard3", block, mask)
        assert failure(before) is None
        assert weight_elements(shrunk(before.model)) == weight_elements(before.model)
