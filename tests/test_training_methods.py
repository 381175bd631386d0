"""The pruning methods against formulas written out by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from etp_deploy.errors import UsageError
from etp_deploy.training import Group, Part
from etp_deploy.training.forces import distances, steepness_for
from etp_deploy.training.regularizers import METHODS, make

WEIGHT = torch.tensor([[3.0, -4.0], [0.0, 0.5], [1.0, 1.0]])
SQUARES, SUMS = (25.0, 0.25, 2.0), (7.0, 0.5, 2.0)


def linear():
    """A layer of three neurons of two weights that all have simple norms."""
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(WEIGHT)
    return model


WANTED = {
    "etp": sum(s * math.exp(5 / 3) ** i for i, s in enumerate(SQUARES)),
    "etp_reference": sum(s / 2 * 1.01 ** (500 / 3 * i) for i, s in enumerate(SUMS)),
    "linear_torque": SQUARES[1] + 2 * SQUARES[2],
    "l1": sum(SUMS),
    "group_lasso": math.sqrt(2) * sum(math.sqrt(s) for s in SQUARES),
}


@pytest.mark.parametrize("method", WANTED)
def test_each_method_is_its_formula(method):
    """Penalties on a layer whose norms are known."""
    penalty = make(method, linear(), beta=0.1).penalty()
    assert float(penalty.detach()) == pytest.approx(0.1 * WANTED[method], rel=1e-6)


def test_slimming_pulls_gains_alone():
    """The penalty is the sum of absolute gains; weights feel nothing, and importance is the gain."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
    regularizer = make("slimming", model, beta=0.1)
    penalty = regularizer.penalty()
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(0.25)
    assert model[1].weight.grad.tolist() == pytest.approx([0.1, -0.1, 0.0])
    assert model[0].weight.grad is None
    assert [group.name for group in regularizer.groups] == ["0"]
    assert regularizer.scores()["0"].tolist() == [0.5, 2.0, 0.0]
    assert regularizer.dead()["0"].tolist() == [False, False, True]


def test_slimming_without_gains_is_refused():
    """There is nothing to slim in a network without BatchNorm."""
    with pytest.raises(UsageError, match="gain"):
        make("slimming", linear())


def test_growing_regularisation_grows_on_the_least():
    """Only the module of the least L1 norm is pulled, by a factor that grows to the ceiling."""
    model = linear()
    regularizer = make("greg", model, beta=0.25, keep=0.7, ceiling=0.6)
    for factor in (0.0, 0.25, 0.5, 0.6, 0.6):
        model.zero_grad()
        penalty = regularizer.penalty()
        penalty.backward()
        assert float(penalty.detach()) == pytest.approx(factor / 2 * SQUARES[1])
        assert model.weight.grad.flatten().tolist() == pytest.approx([0, 0, 0, factor * 0.5, 0, 0])
        regularizer.advance()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("greg", {"norm": "l2"}),
        ("greg", {"pivot": "ordered"}),
        ("greg", {"ceiling": -1.0}),
        ("greg", {"ceiling": math.nan}),
        ("l1", {"keep": 0.5}),
        ("slimming", {"groups": (Group("g", "channels", (Part("1.weight"),)),), "exclude": ["0"]}),
    ],
)
def test_options_that_a_method_does_not_have(method, options):
    """An option that would be ignored is refused."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    assert make(method, model)
    with pytest.raises(UsageError):
        make(method, model, **options)


def test_growth_resumes():
    """The factor is part of a checkpoint; one of another method is refused."""
    one, other = (make("greg", linear(), beta=0.25) for _ in range(2))
    one.advance()
    other.load_state_dict(one.state_dict())
    assert other.strength == 0.25
    with pytest.raises(UsageError, match="method"):
        other.load_state_dict(make("etp", linear()).state_dict())


def test_a_checkpoint_fits_its_groups_and_method():
    """Groups of other sizes are refused even where all modules together are as many; so are methods and norms."""
    one, other = (nn.Sequential(nn.Linear(2, n), nn.Linear(n, 8 - n)) for n in (3, 5))
    state = make("etp", one).state_dict()
    make("etp", one).load_state_dict(state)
    with pytest.raises(UsageError, match="groups"):
        make("etp", other).load_state_dict(state)
    for method in ("greg", "etp_reference"):
        with pytest.raises(UsageError, match="method"):
            make("etp", one).load_state_dict(make(method, one).state_dict())


def test_advance_changes_nothing_for_the_others():
    """Only growing regularisation grows."""
    for method in WANTED:
        regularizer = make(method, linear())
        before = regularizer.penalty()
        regularizer.advance()
        assert torch.equal(before, regularizer.penalty())


def test_unknown_methods_are_refused():
    """The error lists what there is."""
    with pytest.raises(UsageError) as caught:
        make("magnitude", linear())
    assert all(method in str(caught.value.hint) for method in METHODS)


def test_pivots_by_importance():
    """The largest norm is the place to count from, or the first of the ranks."""
    norms = torch.tensor([1.0, 9.0, 3.0, 9.0])
    assert distances(4, "largest", norms).tolist() == [1, 0, 1, 2]
    assert distances(4, "ordered", norms).tolist() == [3, 0, 2, 1]
    assert distances(4, "middle").tolist() == [2, 1, 0, 1]
    assert distances(4, -1).tolist() == [3, 2, 1, 0]


def test_importance_is_that_at_the_start():
    """Distances follow the norms when the regulariser is made and do not move with the weights."""
    model = linear()
    regularizer = make("linear_torque", model, pivot="ordered")
    assert regularizer.forces("").tolist() == [0, 2, 1]
    with torch.no_grad():
        model.weight.copy_(WEIGHT.flip(0))
    assert regularizer.forces("").tolist() == [0, 2, 1]


def test_steepness_from_the_keep_ratio():
    """The force at the first module that is to go is exp(2.5); the paper's five is the half's."""
    assert steepness_for(0.5) == 5.0
    model = nn.Linear(2, 20)
    forces = make("etp", model, keep=0.25).forces("")
    assert float(forces[5]) == pytest.approx(math.exp(2.5))
    for keep in (0.0, 1.5):
        with pytest.raises(UsageError):
            steepness_for(keep)
    with pytest.raises(UsageError):
        make("etp", model, keep=0.25, steepness=5.0)


def overlapping():
    """Two layers whose groups share a weight: rows of the second are one group's, columns the other's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    parts = (Part("0.weight"), Part("0.bias"), Part("1.weight", axis=1))
    groups = [Group("a", "neurons", parts), Group("b", "neurons", (Part("1.weight"),))]
    return model, groups


def by_hand(model, norm, forces, beta):
    """The overlapping penalty through autograd, one module at a time."""
    first, second = model
    modules = [torch.cat([first.weight[i], first.bias[i : i + 1], second.weight[:, i]]) for i in range(4)]
    modules += list(second.weight)
    total = 0.0
    for module, force in zip(modules, forces, strict=True):
        size = {
            "l2_squared": lambda w: w.square().sum(),
            "mean_l1": lambda w: w.abs().mean(),
            "l1": lambda w: w.abs().sum(),
            "l2": lambda w: math.sqrt(w.numel()) * w.norm(),
        }[norm](module)
        total = total + size * force
    return beta * total


@pytest.mark.parametrize("norm", ["l2_squared", "mean_l1", "l1", "l2"])
def test_the_closed_gradient_is_autograds(norm):
    """Penalty, backward and add_gradients equal autograd through a loop, weights of two modules included."""
    model, groups = overlapping()
    regularizer = make("etp", model, groups, 0.1, norm=norm)
    forces = [*regularizer.forces("a").tolist(), *regularizer.forces("b").tolist()]
    wanted = by_hand(model, norm, forces, 0.1)
    slopes = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    penalty = regularizer.penalty()
    torch.testing.assert_close(penalty, wanted, rtol=1e-12, atol=0)
    (3 * penalty).backward()
    for weight, slope in zip(model.parameters(), slopes, strict=True):
        assert (weight.grad is None) == (slope is None)
        if slope is not None:
            torch.testing.assert_close(weight.grad, 3 * slope, rtol=1e-12, atol=0)
            weight.grad.fill_(1.0)
    regularizer.add_gradients(scale=2.0)
    for weight, slope in zip(model.parameters(), slopes, strict=True):
        if slope is not None:
            torch.testing.assert_close(weight.grad, 1 + 2 * slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", ["l2_squared", "mean_l1", "l1"])
def test_shrink_is_exact_where_modules_overlap(norm):
    """No weights around the result have less penalty plus half the squared distance."""
    model, groups = overlapping()
    regularizer = make("etp", model, groups, 0.05, norm=norm)
    start = [weight.detach().clone() for weight in model.parameters()]
    regularizer.shrink(0.5)
    found = [weight.detach().clone() for weight in model.parameters()]

    def objective(weights):
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        distance = sum((w - s).square().sum() for w, s in zip(weights, start, strict=True))
        return float(0.5 * regularizer.penalty().detach() + distance / 2)

    least = objective(found)
    for _ in range(50):
        assert objective([w + 1e-3 * torch.randn_like(w) for w in found]) >= least
    assert objective(start) > least


def test_kill_zeroes_whole_modules():
    """All parts of the chosen modules are zero, everything else keeps its bits."""
    model, groups = overlapping()
    before = [weight.detach().clone() for weight in model.parameters()]
    regularizer = make("etp", model, groups)
    regularizer.kill("a", [1, 3])
    wanted = [weight.clone() for weight in before]
    wanted[0][[1, 3]] = 0
    wanted[1][[1, 3]] = 0
    wanted[2][:, [1, 3]] = 0
    assert all(torch.equal(w, p.detach()) for w, p in zip(wanted, model.parameters(), strict=True))
    assert regularizer.dead()["a"].tolist() == [False, True, False, True]
    with pytest.raises(UsageError):
        regularizer.kill("a", [4])


def test_scores_are_norms_over_all_parts():
    """Importance counts rows, bias and columns; relative scores start at a mean of one."""
    model, groups = overlapping()
    regularizer = make("l1", model, groups)
    first, second = model
    wanted = first.weight.square().sum(1) + first.bias.square() + second.weight.square().sum(0)
    torch.testing.assert_close(regularizer.scores()["a"], wanted.sqrt())
    assert float(regularizer.relative_scores()["b"].mean()) == pytest.approx(1.0)


def test_listed_indices_say_any_layout():
    """A part that lists the module of each index: interleaved, with gaps, modules of several indices."""
    model = linear()
    group = Group("g", "channels", (Part("weight", index=(1, -1, 0)), Part("bias", index=(1, 0, 0))))
    regularizer = make("l1", model, [group], 1.0)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
    torch.testing.assert_close(float(regularizer.penalty().detach()), 7.0 + 2.0 + 60.0)
    regularizer.kill("g", [0])
    assert model.bias.tolist() == [10.0, 0.0, 0.0]
    assert model.weight.tolist() == [[3.0, -4.0], [0.0, 0.5], [0.0, 0.0]]


def test_deciding_sets():
    """A module with two writers dies only once both are zero."""
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    parts = (Part("a.weight"), Part("b.weight"))
    regularizer = make("l1", model, [Group("width", "channels", parts, deciding=((0, 1),))])
    with torch.no_grad():
        model["a"].weight[:2] = 0
        model["b"].weight[1:] = 0
    assert regularizer.dead()["width"].tolist() == [False, True, False]
    plain = make("l1", model, [Group("width", "channels", parts)])
    assert plain.dead()["width"].tolist() == [True, True, True]


def test_state_resumes_the_same_forces_and_the_frozen():
    """Forces by importance, beta and what was frozen survive a checkpoint; other groups are refused."""
    model, groups = overlapping()
    one = make("etp", model, groups, pivot="ordered")
    one.kill("a", [2])
    one.freeze()
    one.beta = 0.7
    other = make("etp", model, groups, pivot="ordered")
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.forces("a"), other.forces("a"))
    assert other.beta == 0.7
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    other.hold()
    assert model[0].weight.sum(1).tolist() == [3, 3, 0, 3]
    with pytest.raises(UsageError):
        make("etp", model, groups[:1]).load_state_dict(one.state_dict())


@pytest.mark.parametrize("norm", ["l2_squared", "mean_l1", "l1", "l2"])
def test_half_precision_weights(norm):
    """Gradients and steps of bfloat16 weights are those of float32, rounded."""
    torch.manual_seed(0)
    half = nn.Linear(8, 4).bfloat16()
    full = copy.deepcopy(half).float()
    for model in (half, full):
        regularizer = make("etp", model, beta=0.01, norm=norm)
        model.weight.grad = torch.zeros_like(model.weight)
        regularizer.add_gradients()
        model.weight.grad *= 2
        regularizer.penalty().backward()
        regularizer.shrink(0.1)
    assert half.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.grad.float(), full.weight.grad, rtol=0.02, atol=1e-5)
    torch.testing.assert_close(half.weight.float(), full.weight, rtol=0.02, atol=1e-4)
