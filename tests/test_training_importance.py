"""Sensitivity against derivatives taken by hand, the order of removal against what was planted, forces by it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from etp_deploy.errors import UsageError
from etp_deploy.training import (
    Blueprint,
    Cost,
    Group,
    Part,
    PlannedCost,
    TorqueRegularizer,
    coupled_groups,
    make,
    removal_order,
    sensitivity,
)
from etp_deploy.training.dying import Modules
from etp_deploy.training.forces import network_distances

HIDDEN = 6


def network():
    """Two hidden layers with a normalisation between them, trained by nobody."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, HIDDEN),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    return model.train()


def groups():
    """The neurons of both layers, with everything that is theirs."""
    first = [Part(name, decisive="weight" in name) for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    second = [Part("3.weight"), Part("3.bias", decisive=False)]
    return (
        Group("first", "neurons", (*first, Part("3.weight", axis=1))),
        Group("second", "neurons", (*second, Part("5.weight", axis=1))),
    )


def batches(count=6):
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def loss(model, batch):
    """What the network is trained for."""
    return functional.cross_entropy(model(batch[0]), batch[1])


class Share(Cost):
    """What the live modules cost together, the same price for every module of a group."""

    def __init__(self, prices):
        self.prices = prices

    def ratio(self, model, zero):
        """Return it, over what all cost."""
        twin = Modules(model, groups(), 0.0, "module")
        flat, start = torch.from_numpy(zero), 0
        kept = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        with torch.no_grad():
            for weight in model.parameters():
                weight[flat[start : start + weight.numel()].reshape(weight.shape)] = 0
                start += weight.numel()
            dead = twin.dead()
            for name, weight in model.named_parameters():
                weight.copy_(kept[name])
        whole = sum(price * len(dead[name]) for name, price in self.prices.items())
        return sum(price * int((~dead[name]).sum()) for name, price in self.prices.items()) / whole


def test_sensitivity_is_the_derivative_of_shrinking_a_module():
    """Central differences of the loss, as all weights of one module are scaled, squared and averaged."""
    model, declared = network().double(), groups()
    data = [(x.double(), y) for x, y in batches(3)]
    found = sensitivity(model, declared, data, loss)
    model.eval()
    modules = Modules(model, declared, 0.0, "module")
    step = 1e-5
    for place in range(HIDDEN + 8):
        row = torch.arange(HIDDEN + 8) == place
        marks = modules.marks(row)
        wanted = 0.0
        for batch in data:
            ends = []
            for sign in (1, -1):
                scaled = {
                    name: torch.where(mark, weight * (1 + sign * step), weight)
                    for name, mark in marks.items()
                    for weight in [model.get_parameter(name).detach()]
                }
                state = {**dict(model.state_dict()), **scaled}
                outputs = torch.func.functional_call(model, state, (batch[0],))
                ends.append(float(functional.cross_entropy(outputs, batch[1])))
            wanted += ((ends[0] - ends[1]) / (2 * step)) ** 2 / len(data)
        assert float(torch.cat(list(found.values()))[place]) == pytest.approx(wanted, rel=1e-5, abs=1e-12)


def test_the_network_stays_as_it_is():
    """Mode, gradients, what is frozen and the running statistics are those from before."""
    model = network()
    model[5].weight.requires_grad_(False)
    model[4].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sensitivity(model, groups(), batches(), loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[5].weight.requires_grad
    assert model.training
    assert not model[4].training
    assert all((row > 0).any() for row in found.values())


def test_what_nobody_reads_goes_first():
    """Modules whose readers are zero have no sensitivity and the first places; what costs more comes sooner."""
    model = network()
    with torch.no_grad():
        model[3].weight[:, [1, 4]] = 1e-9
        model[5].weight[:, 2] = 1e-9
    needless = torch.cat(list(sensitivity(model, groups(), batches(), loss).values())) < 1e-12
    assert set(needless.nonzero().flatten().tolist()) >= {1, 4, HIDDEN + 2}
    cost = Share({"first": 1.0, "second": 1.0})
    order = removal_order(model, groups(), batches(), loss, cost=cost, target=0.5, rounds=3)
    places = torch.cat(list(order.values()))
    assert sorted(places[needless].tolist()) == list(range(int(needless.sum())))
    assert sorted(places.tolist()) == list(range(HIDDEN + 8))
    dear = removal_order(
        model, groups(), batches(), loss, cost=Share({"first": 1e-9, "second": 1.0}), target=0.5
    )
    # of what is needed, that goes first whose absence saves most
    needed = torch.cat(list(dear.values())).masked_fill(needless, math.inf)
    assert int(needed.argmin()) >= HIDDEN
    assert int((needed[HIDDEN:] < needed[:HIDDEN].min()).sum()) >= 1


class Count(Cost):
    """Which share of the neurons of a layer of one input is not zero."""

    def ratio(self, model, zero):
        """Return the share."""
        return float((~zero[: len(model.first)]).mean())


class Twins(nn.Module):
    """Four neurons: two behind a tanh that is flat while both are there, two that count for little."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(4, 1))
        self.readers = nn.Parameter(torch.tensor([[1.5, 1.5, 0.05, 0.05]]))

    def forward(self, x):
        """Return one number for each example."""
        read = x @ self.first.T * self.readers
        return torch.tanh(read[:, :2].sum(1)) + read[:, 2:].sum(1)


@pytest.mark.parametrize(("rounds", "twins"), [(1, 2), (4, 1)])
def test_rounds_keep_one_of_two_that_stand_in_for_each_other(rounds, twins):
    """Asked once, both twins go, for neither matters while the other is there; asked again, the second is needed."""
    declared = [Group("g", "neurons", (Part("first"), Part("readers", axis=1)))]
    data = [torch.tensor([[1.0], [-1.0]])]

    def error(network, x):
        return ((network(x) - 2 * x[:, 0]) ** 2).mean()

    found = removal_order(Twins(), declared, data, error, cost=Count(), target=0.5, rounds=rounds)["g"]
    assert sum(place in {0, 1} for place in found.argsort()[:2].tolist()) == twins


def test_out_of_reach_and_what_cannot_be_meant():
    """One line each says what is wrong."""
    model, cost = network(), Share({"first": 1.0, "second": 1.0})
    for options, where in (
        ({"target": 1.5}, "target"),
        ({"target": 0.05}, "target 0.05"),
        ({"target": 0.5, "rounds": 0}, "rounds, least"),
        ({"target": 0.5, "least": 2.0}, "rounds, least"),
        ({"target": 0.4, "least": 0.5}, "target 0.4"),
    ):
        with pytest.raises(UsageError) as caught:
            removal_order(model, groups(), batches(), loss, cost=cost, **options)
        assert caught.value.where == where
    with pytest.raises(UsageError, match="no batches"):
        sensitivity(model, groups(), [], loss)


def test_an_order_from_the_surgery():
    """Groups, prices and order of a convolutional network; as many modules at the front as reach the target."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 36, 3),
    ).eval()  # fmt: skip
    example = torch.randn(1, 1, 8, 8)
    blueprint = Blueprint(model, example)
    declared = coupled_groups(model, example, blueprint=blueprint)
    data = [(torch.randn(4, 1, 8, 8), torch.randint(3, (4,))) for _ in range(3)]
    order = removal_order(
        model, declared, data, loss, cost=PlannedCost(blueprint, "macs"), target=0.5, rounds=3
    )
    row = torch.cat([order[group.name] for group in declared])
    cost = PlannedCost(blueprint, "macs")
    modules = Modules(model, declared, 0.0, "module")
    ratios = [cost.ratio(model, modules.zeros(row < count)) for count in range(len(row) - 1)]
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) <= 0.5


def test_forces_by_rank_over_the_network():
    """A force is exp(s r / N) for the rank r among all modules, whichever the group."""
    importance = {"first": torch.tensor([6.0, 1, 2, 3, 4, 5]), "second": torch.arange(10.0, 18.0)}
    regularizer = make("etp", network(), groups(), pivot="network", importance=importance, steepness=3.0)
    ranks = {"first": [8, 13, 12, 11, 10, 9], "second": [7, 6, 5, 4, 3, 2, 1, 0]}
    for name, wanted in ranks.items():
        assert regularizer.forces(name).tolist() == pytest.approx([math.exp(3 * r / 14) for r in wanted])
    linear = make("linear_torque", network(), groups(), pivot="network", importance=importance)
    assert linear.forces("second").tolist() == pytest.approx([r * 8 / 14 for r in ranks["second"]])
    assert [len(row) for row in network_distances(list(importance.values()))] == [6, 8]


def test_without_an_importance_norms_rank_in_units_of_their_groups():
    """Scaling all weights of one group changes no rank over the network."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(7, 4))
    declared = [Group(name, "neurons", (Part(f"{name}.weight"),)) for name in ("0", "1")]
    before = make("etp", model, declared, pivot="network")
    with torch.no_grad():
        model[1].weight.mul_(100.0)
    after = make("etp", model, declared, pivot="network")
    assert torch.cat([before.forces(name) for name in "01"]).unique().numel() == 9
    for name in "01":
        assert torch.equal(before.forces(name), after.forces(name))


def test_ranks_in_a_group_by_importance():
    """In one group, too, what is given counts in place of the norms."""
    model = nn.Linear(2, 4)
    given = {"": torch.tensor([0.0, 5.0, 1.0, 2.0])}
    ordered = make("linear_torque", model, pivot="ordered", importance=given)
    assert ordered.forces("").tolist() == [3, 0, 2, 1]
    largest = make("linear_torque", model, pivot="largest", importance=given)
    assert largest.forces("").tolist() == [1, 0, 1, 2]


def layers_of_two_scales():
    """Two layers, one of weights a hundred times those of the other, all modules of one size in each."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(5, 4).sign() * 0.01)
        model[1].weight.copy_(torch.randn(6, 5).sign())
    return model, [Group(name, "neurons", (Part(f"{name}.weight"),)) for name in "01"]


@pytest.mark.parametrize("method", ["group_lasso", "l1"])
def test_relative_pulls_reach_zero_together(method):
    """Rates that sum up to one over beta bring every module to zero, in both layers, and no fewer do."""
    model, declared = layers_of_two_scales()
    regularizer = make(method, model, declared, beta=2.0, relative=True)
    for _ in range(9):
        regularizer.shrink(0.05)
    assert not any(dead.any() for dead in regularizer.dead().values())
    left = [float(weight.detach().abs().mean()) for weight in (model[0].weight, model[1].weight)]
    assert left == pytest.approx([0.001, 0.1])
    regularizer.shrink(0.0501)
    assert all(dead.all() for dead in regularizer.dead().values())


def test_relative_scales_are_those_of_the_start():
    """A checkpoint has them; of zeros nothing is made; a squared norm needs none."""
    model, declared = layers_of_two_scales()
    regularizer = make("group_lasso", model, declared, relative=True)
    with torch.no_grad():
        model[1].weight.zero_()
    other = make("group_lasso", model, declared, relative=True)
    assert other.forces("1").tolist() == [1.0] * 6
    other.load_state_dict(regularizer.state_dict())
    assert other.forces("0").tolist() == pytest.approx([0.01] * 5)
    with pytest.raises(UsageError, match="relative by itself"):
        make("etp", model, declared, relative=True)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"pivot": 0, "importance": {"": torch.zeros(4)}}, "importance"),
        ({"pivot": "ordered", "importance": {}}, "importance"),
        ({"pivot": "ordered", "importance": {"": torch.zeros(4), "other": torch.zeros(2)}}, "importance"),
        ({"pivot": "network", "importance": {"": torch.zeros(3)}}, "importance of "),
        ({"pivot": "network", "importance": {"": torch.tensor([0, 1, 2, math.nan])}}, "importance of "),
    ],
)
def test_importance_that_cannot_be_meant(options, where):
    """What no pivot goes by, or does not fit the groups, is refused."""
    with pytest.raises(UsageError) as caught:
        TorqueRegularizer(nn.Linear(2, 4), **options)
    assert caught.value.where == where
