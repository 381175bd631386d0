"""Mixtures of experts and Einsum: stacks of matrices lose what each of them can do without, by exact counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import failure, shrunk, weight_elements
from onnx import numpy_helper
from test_surgery_regressions import Net, gained
from torch import nn

from etp_deploy import compress, export

EXPERTS, WIDTH, HIDDEN = 3, 6, 8


def dead_rows(array, dead, axis):
    """Zero other indices of an axis for each expert."""
    for expert, channels in enumerate(dead):
        array[expert][(slice(None),) * axis + (list(channels),)] = 0
    return array


def experts(dead, *, expanded=False, gated=False, biased=True):
    """Return a mixture with stacked experts: routed, summed, read by a matrix."""
    net = Net(x=("batch", WIDTH))
    tokens = "x"
    if expanded:
        net.node("Unsqueeze", ["x", np.array([0])], "one")
        net.node("Expand", ["one", np.array([EXPERTS, 1, 1])], "many")
        tokens = "many"
    net.node("MatMul", [tokens, dead_rows(net.rand(EXPERTS, WIDTH, HIDDEN), dead, 1)], "up")
    hidden = "up"
    if biased:
        net.node("Add", ["up", net.rand(EXPERTS, 1, HIDDEN)], "biased")
        hidden = "biased"
    net.node("Tanh" if gated else "Sigmoid", [hidden], "active")
    if gated:
        net.node("MatMul", [tokens, net.rand(EXPERTS, WIDTH, HIDDEN)], "gate")
        net.node("Mul", ["active", "gate"], "product")
    net.node("MatMul", ["product" if gated else "active", net.rand(EXPERTS, HIDDEN, WIDTH)], "down")
    net.node("Add", ["down", net.rand(EXPERTS, 1, WIDTH)], "experts")
    net.node("MatMul", ["x", net.rand(WIDTH, EXPERTS)], "scores")
    net.node("Softmax", ["scores"], "shares", axis=-1)
    net.node("Transpose", ["shares"], "turned", perm=[1, 0])
    net.node("Unsqueeze", ["turned", np.array([2])], "routed")
    net.node("Mul", ["experts", "routed"], "weighted")
    net.node("ReduceSum", ["weighted", np.array([0])], "mixed", keepdims=0)
    net.node("MatMul", ["mixed", net.rand(WIDTH, 4)], "y")
    return net.case("y")


def elements(kept, *, gated=False, biased=True):
    """Return the elements of a mixture whose experts keep so many hidden neurons each."""
    inner = EXPERTS * kept * (WIDTH * (3 if gated else 2) + biased)
    return inner + EXPERTS * WIDTH + WIDTH * EXPERTS + 4 * WIDTH


DEAD = {"equal": (((0, 3), (1, 5), (2, 7)), 6), "unequal": (((0, 1, 2), (3,), (4, 5)), 7)}


@pytest.mark.parametrize("counts", DEAD)
@pytest.mark.parametrize("form", [{}, {"expanded": True}, {"gated": True, "biased": False}])
def test_hidden_neurons_die_expert_by_expert(form, counts):
    """Which neurons go may differ from expert to expert, how many may not; their constants join the bias."""
    dead, kept = DEAD[counts]
    sizes = {key: value for key, value in form.items() if key != "expanded"}
    case = experts(dead, **form)
    assert gained(case) == (elements(HIDDEN, **sizes), elements(kept, **sizes))


def test_neurons_that_nobody_reads_die_expert_by_expert():
    """Zero rows of the second matrix are as good as zero columns of the first."""
    net = Net(x=(4, WIDTH))
    net.node("MatMul", ["x", net.rand(EXPERTS, WIDTH, HIDDEN)], "up")
    net.node("Relu", ["up"], "active")
    down = dead_rows(net.rand(EXPERTS, HIDDEN, 5), ((0, 3), (1, 5), (2, 7)), 0)
    net.node("MatMul", ["active", down], "y")
    assert gained(net.case("y")) == (EXPERTS * HIDDEN * 11, EXPERTS * 6 * 11)


def test_experts_whose_neurons_are_permuted_alike_keep_one_order():
    """Negative control: taking the first expert's places for all of them gives other results."""
    dead, _ = DEAD["equal"]
    case = experts(dead)
    assert failure(case) is None
    first = experts(((0, 3),) * EXPERTS)
    assert weight_elements(shrunk(case.model)) == weight_elements(shrunk(first.model))
    names = {item.name: item for item in shrunk(case.model).graph.initializer}
    original = {item.name: item for item in case.model.graph.initializer}
    rows = [
        np.asarray(numpy_helper.to_array(names["w0"])[e] == numpy_helper.to_array(original["w0"])[e][:, keep])
        for e, keep in enumerate(([1, 2, 4, 5, 6, 7], [0, 2, 3, 4, 6, 7], [0, 1, 3, 4, 5, 6]))
    ]
    assert np.all(rows)


def test_channels_that_an_expand_repeats_are_common_to_all_experts():
    """Inputs that all experts read go where none of them reads them."""
    net = Net(x=(4, 5))
    net.node("MatMul", ["x", net.rand(5, WIDTH)], "stream")
    up = net.rand(EXPERTS, WIDTH, HIDDEN)
    up[:, 2] = 0
    up[0, 4] = 0
    net.node("MatMul", ["stream", up], "y")
    assert gained(net.case("y")) == (5 * 6 + 3 * 6 * 8, 5 * 5 + 3 * 5 * 8)


def test_heads_with_matrices_of_their_own():
    """A constant with four axes: heads in front, channels of each read by that head alone."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 12, dead=(1, 2, 4, 7, 9, 10), axis=1)], "p")
    net.node("Reshape", ["p", np.array([2, 5, 3, 4])], "split")
    net.node("Transpose", ["split"], "heads", perm=[0, 2, 1, 3])
    net.node("MatMul", ["heads", net.rand(1, 3, 4, 7)], "y")
    assert gained(net.case("y")) == (6 * 12 + 3 * 4 * 7, 6 * 6 + 3 * 2 * 7)


@pytest.mark.parametrize("operator", ["MatMul", "FusedMatMul"])
def test_a_stack_in_front(operator):
    """The constant may be the first operand."""
    net = Net(x=(3, 6, 4))
    first = net.rand(3, 8, 6)
    first[:, (1, 4)] = 0
    net.node("MatMul", [first, "x"], "h")
    net.node("Relu", ["h"], "r")
    if operator == "MatMul":
        net.node("MatMul", [net.rand(3, 5, 8), "r"], "y")
    else:
        net.node("FusedMatMul", [net.rand(3, 8, 5), "r"], "y", domain="com.microsoft", transA=1, alpha=0.5)
    assert gained(net.case("y")) == (3 * 8 * 11, 3 * 6 * 11)


def test_rows_that_lack_channels_take_those_of_others():
    """Where a stack's channels must line up (a product with itself), all keep the same ones if they can."""
    net = Net(x=("N", 7))
    up = dead_rows(net.rand(3, 7, 6), ((0, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (0, 4)), 1)
    net.node("MatMul", ["x", up], "h")
    net.node("Transpose", ["h"], "t", perm=[0, 2, 1])
    net.node("MatMul", ["h", "t"], "y")
    assert gained(net.case("y")) == (3 * 7 * 6, 3 * 7 * 4)


# Einsum


def test_einsum_projects_heads():
    """Projections to heads and back, as EinsumDense writes them: whole heads go, and channels inside."""
    net = Net(x=(2, 5, 6))
    into, out = net.rand(6, 4, 5), net.rand(4, 5, 6)
    into[:, 1] = 0
    for head, channel in ((0, 0), (2, 3), (3, 4)):
        into[:, head, channel] = 0
    net.node("Einsum", ["x", into], "q", equation="abc,cde->abde")
    net.node("Relu", ["q"], "r")
    net.node("Einsum", ["r", out], "y", equation="abcd,cde->abe")
    assert gained(net.case("y")) == (2 * 6 * 20, 2 * 6 * 12)


def test_einsum_of_two_computed_matrices():
    """Attention in Einsum's words: query and key lose the same channels, values theirs, and dead heads go."""
    net = Net(x=("batch", 5, 6))
    for name in "qkv":
        weight = net.rand(6, 3, 4)
        weight[:, 1] = 0
        if name != "q":
            weight[:, :, 2] = 0
        net.node("Einsum", ["x", weight], name, equation="btc,chd->bthd")
    net.node("Einsum", ["q", "k"], "s", equation="bqhd,bkhd->bhqk")
    net.node("Softmax", ["s"], "p", axis=-1)
    net.node("Einsum", ["p", "v"], "o", equation="bhqk,bkhd->bqhd")
    net.node("Einsum", ["o", net.rand(3, 4, 6)], "y", equation="bqhd,hde->bqe")
    assert gained(net.case("y")) == (4 * 72, 4 * 36)


@pytest.mark.parametrize("equation", ["bqhd,bkhe->bhqk", "bqhd,bkhd->bhq"])
def test_einsum_that_is_no_matrix_product_is_left_alone(equation):
    """What sums over an axis of one operand stays whole."""
    net = Net(x=(2, 5, 6))
    for name in "qk":
        net.node("Einsum", ["x", net.rand(6, 3, 4, dead=(1,), axis=1)], name, equation="btc,chd->bthd")
    net.node("Einsum", ["q", "k"], "y", equation=equation)
    before, after = gained(net.case("y"))
    assert before == after


def test_channels_merged_with_a_size_that_only_the_weight_knows():
    """A Flatten of N x 2 in front of a matrix with four columns: how the columns lie is not known."""
    net = Net(x=(2, 4, 9))
    net.node("Einsum", ["x", net.rand(9, 4, 2, dead=(0,), axis=2)], "h", equation="abc,cbo->bao")
    net.node("Flatten", ["h"], "f", axis=1)
    net.node("Gemm", ["f", net.rand(6, 4)], "y", transB=1)
    case = net.case("y")
    case.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    before, after = gained(case)
    assert before == after


# as torch exports them


class Expert(nn.Module):
    """A gated network in two steps."""

    def __init__(self, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, hidden), nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x):
        """Return the expert's answer to some tokens."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """Experts apart, each given the tokens that are routed to it, as Mixtral's are."""

    def __init__(self, hidden):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(hidden) for _ in range(EXPERTS))

    def forward(self, x):
        """Return the routed sum for each token."""
        tokens = x.reshape(-1, WIDTH)
        shares, chosen = torch.topk(torch.softmax(self.router(tokens), -1), 2, dim=-1)
        routes = nn.functional.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        out = torch.zeros_like(tokens)
        for route, expert in zip(routes, self.experts, strict=True):
            place, token = torch.where(route)
            out = out.index_add(0, token, expert(tokens[token]) * shares[token, place, None])
        return out

    def plant(self, dead):
        """Let hidden neurons die: the first matrix lacks their rows, and one of the biases is zero."""
        for expert, channels in zip(self.experts, dead, strict=True):
            for tensor in (expert.gate.weight, expert.gate.bias, expert.up.weight):
                tensor[list(channels)] = 0


class Batched(nn.Module):
    """Experts stacked, each given all tokens."""

    def __init__(self, hidden):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * hidden))
        self.shift = nn.Parameter(torch.randn(EXPERTS, 1, 2 * hidden))
        self.down = nn.Parameter(torch.randn(EXPERTS, hidden, WIDTH))

    def forward(self, x):
        """Return the weighted sum of all experts for each token."""
        tokens = x.reshape(-1, WIDTH)
        shares = torch.softmax(self.router(tokens), -1)
        gate, up = (
            torch.bmm(tokens.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH), self.up) + self.shift
        ).chunk(2, -1)
        return (torch.bmm(nn.functional.silu(gate) * up, self.down) * shares.t()[:, :, None]).sum(0)

    def plant(self, dead):
        """Let hidden neurons die, gate and all."""
        for expert, channels in enumerate(dead):
            places = [*channels, *(HIDDEN + channel for channel in channels)]
            self.up[expert][:, places] = 0
            self.shift[expert][:, list(channels)] = 0


def parameters(module):
    """Return how many parameters a module has."""
    return sum(tensor.numel() for tensor in module.parameters())


@pytest.mark.parametrize(
    ("kind", "exporter"), [(Routed, "dynamo"), (Routed, "torchscript"), (Batched, "dynamo")]
)
def test_exported_mixtures_shrink_to_what_small_ones_have(kind, exporter, tmp_path):
    """As many parameters as the mixture built small; what else is stored is not more."""
    dead, kept = DEAD["equal"]
    torch.manual_seed(0)
    model = kind(HIDDEN).eval()
    with torch.no_grad():
        model.plant(dead)
    path = tmp_path / "model.onnx"
    export(model, {"x": torch.randn(2, 5, WIDTH)}, path, dynamic=["x.0=batch"], exporter=exporter)
    report = compress(path, tmp_path / "small.onnx", align="off")
    extra = report.before.parameters - parameters(model)
    assert 0 <= extra <= 1
    assert report.after.parameters == parameters(kind(kept)) + extra
