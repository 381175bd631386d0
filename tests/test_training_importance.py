"""Sensitivity against derivatives taken by hand, the order of removal against what was planted, forces by it."""

import math
from dataclasses import replace

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
from etp_deploy.training.forces import distances, network_distances

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


def row(found):
    """All groups' numbers in one row."""
    return torch.cat(list(found.values()))


EVEN = {"first": 1.0, "second": 1.0}


def test_asked_once_the_order_is_that_of_the_sensitivity():
    """With equal prices and one round every module has the place of its number, those that stay among them."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = row(sensitivity(model, groups(), batches(), loss)).argsort(stable=True)
    found = removal_order(model, groups(), batches(), loss, cost=Share(EVEN), target=0.6, rounds=1)
    assert row(found).argsort().tolist() == wanted.tolist()
    # the network itself stays
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


def test_what_nobody_reads_goes_first():
    """Modules whose readers are all but zero have all but no sensitivity and the first places."""
    model = network()
    with torch.no_grad():
        model[3].weight[:, [1, 4]] = 1e-9
        model[5].weight[:, 2] = 1e-9
    needless = row(sensitivity(model, groups(), batches(), loss)) < 1e-12
    assert set(needless.nonzero().flatten().tolist()) >= {1, 4, HIDDEN + 2}
    order = removal_order(model, groups(), batches(), loss, cost=Share(EVEN), target=0.5, rounds=3)
    assert sorted(row(order)[needless].tolist()) == list(range(int(needless.sum())))
    assert sorted(row(order).tolist()) == list(range(HIDDEN + 8))


def test_what_saves_most_goes_before_what_matters_least():
    """The least sensitive module is of the group that costs nothing, and stays."""
    model = network()
    found = row(sensitivity(model, groups(), batches(), loss))
    live = found.masked_fill(found == 0, math.inf)
    cheap = "first" if int(live.argmin()) < HIDDEN else "second"
    prices = {name: 1e-9 if name == cheap else 1.0 for name in EVEN}
    order = removal_order(model, groups(), batches(), loss, cost=Share(prices), target=0.5, rounds=1)
    dear = row({name: own for name, own in order.items() if name != cheap})
    least = row(order)[int(live.argmin())]
    assert float(least) > float(dear.sort().values[len(dear) // 2 - 1])


def test_a_price_in_steps_is_seen():
    """A group that is priced in threes goes as one that is priced in ones, though one module of it saves nothing."""

    class Threes(Share):
        def ratio(self, model, zero):
            """Return the price, the first group's live modules rounded up to threes."""
            exact = Share({"first": 1.0, "second": 0.0}).ratio(model, zero) * HIDDEN
            rest = Share({"first": 0.0, "second": 1.0}).ratio(model, zero) * 8
            return (math.ceil(exact / 3) * 3 + rest) / (HIDDEN + 8)

    model = network()
    with torch.no_grad():
        model[3].weight[:, :3] = 1e-6
    order = removal_order(model, groups(), batches(), loss, cost=Threes(EVEN), target=0.7, rounds=1)
    needless = row(sensitivity(model, groups(), batches(), loss)) < 1e-12
    assert needless[:3].all()
    assert max(order["first"][:3].tolist()) < int(needless.sum())


class Sums(nn.Module):
    """Two layers of four neurons side by side, of which the first hardly counts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(4, 1))

    def forward(self, x):
        """Return one number for each example."""
        return 1e-4 * (x @ self.a.T).sum(1) + (x @ self.b.T).sum(1)


@pytest.mark.parametrize(("least", "gone"), [(0.0, [3, 1]), (0.5, [2, 2]), (0.6, None)])
def test_the_least_that_may_stay_stays(least, gone):
    """Of a group that hardly counts the wanted share is kept, at least one module; the other gives the rest."""
    declared = [Group(name, "neurons", (Part(name),)) for name in "ab"]

    class Left(Cost):
        def ratio(self, model, zero):
            """Return which share of the neurons is not zero."""
            del model
            return float((~zero).mean())

    def order():
        data = [torch.ones(2, 1)]
        options = {"cost": Left(), "target": 0.5, "rounds": 2, "least": least}
        return removal_order(Sums(), declared, data, lambda m, x: m(x).square().mean(), **options)

    if gone is None:
        with pytest.raises(UsageError, match="out of reach"):
            order()
    else:
        assert [int((own < 4).sum()) for own in order().values()] == gone


def test_what_is_dead_already_comes_first_and_counts():
    """A dead module has the first place; the target is relative to the dense network."""
    model = network()
    with torch.no_grad():
        model[3].weight[5] = 0
    order = removal_order(model, groups(), batches(), loss, cost=Share(EVEN), target=0.5, rounds=2)
    assert float(order["second"][5]) == 0
    with pytest.raises(UsageError, match=r"costs 0\.929 of the dense one already"):
        removal_order(model, groups(), batches(), loss, cost=Share(EVEN), target=0.95)


def test_wrapped_and_narrow_networks():
    """Wrappers are looked through; bfloat16 weights are multiplied and summed up in float32."""
    model = network()
    plain = row(sensitivity(model, groups(), batches(), loss))
    wrapped = row(sensitivity(nn.DataParallel(model), groups(), batches(), loss))
    assert torch.allclose(plain, wrapped)
    narrow = network().bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches()]
    found = row(
        sensitivity(narrow, groups(), data, lambda m, b: functional.cross_entropy(m(b[0]).float(), b[1]))
    )
    assert torch.allclose(found.sqrt(), plain.sqrt(), atol=0.1 * float(plain.max()) ** 0.5)


def test_sums_over_narrow_weights_are_wide():
    """1,001 weights of one with gradients of one sum up to 1,001, which bfloat16 does not have."""
    model = nn.Linear(1001, 2, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    declared = [Group("g", "neurons", (Part("weight"),))]
    found = sensitivity(model, declared, [torch.ones(1, 1001).bfloat16()], lambda m, x: m(x).float().sum())
    assert found["g"].tolist() == [1001.0**2] * 2


def test_groups_that_hold_each_other():
    """Once the heads of a layer are gone nothing is left of its neurons: said, not planned with."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    declared = [
        Group("rows", "neurons", (Part("0.weight"),)),
        Group("halves", "heads", (Part("0.weight", split=(2, 2)),)),
    ]

    class Rows(Cost):
        def ratio(self, network, zero):
            """Return which share of the rows is not zero."""
            del network
            return float((~zero[:12].reshape(4, 3).all(1)).mean())

    data = [(torch.randn(4, 3).double(), None)]
    with pytest.raises(UsageError, match=r"out of reach|nothing is left"):
        removal_order(model, declared, data, lambda m, b: m(b[0]).square().mean(), cost=Rows(), target=0.1)


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
    with pytest.raises(UsageError, match="only once"):
        removal_order(model, groups(), iter(batches()), loss, cost=cost, target=0.5)


def _of_another(network):
    """A loss of a network of its own, not of the one that it is given."""
    return lambda _, batch: loss(network, batch)


@pytest.mark.parametrize(
    ("data", "made", "text"),
    [
        ([], loss, "no batches"),
        ([(torch.full((2, 4), math.nan), torch.tensor([0, 1]))], loss, "no numbers"),
        (batches(1), _of_another(network()), "does not reach"),
        (batches(1), lambda model, batch: loss(model, batch).detach(), "does not reach"),
    ],
)
def test_a_loss_that_says_nothing_is_refused(data, made, text):
    """What would pass for modules that nobody needs."""
    with pytest.raises(UsageError, match=text):
        sensitivity(network(), groups(), data, made)


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
    cost = PlannedCost(blueprint, "macs")
    modules = Modules(model, declared, 0.0, "module")

    def reach(places):
        """Return after how many modules, by place, half of the multiplications are gone."""
        for count in range(len(places)):
            if cost.ratio(model, modules.zeros(places < count)) <= 0.5:
                return count
        return len(places)

    places = row(order)
    assert 0 < reach(places) < len(places) - 1
    kept = [places[start : start + n] >= reach(places) for start, n in ((0, len(order[declared[0].name])),)]
    assert all(bool(own.any()) for own in kept)
    # the first to go are those that matter least for what they save, in the network as it was
    first = int(places.argmin())
    alone = [
        1 - cost.ratio(model, modules.zeros(torch.arange(len(places)) == place))
        for place in range(len(places))
    ]
    worth = row(sensitivity(model, declared, data, loss)) / torch.tensor(alone)
    assert float(worth[first]) <= float(worth.median())


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


def test_a_group_with_a_pivot_of_its_own_keeps_it():
    """The others rank over the network, it included."""
    given = {"first": torch.arange(6.0), "second": torch.arange(10.0, 18.0)}
    first, second = groups()
    declared = (replace(first, pivot=0), second)
    regularizer = make("linear_torque", network(), declared, pivot="network", importance=given)
    assert regularizer.forces("first").tolist() == [0, 1, 2, 3, 4, 5]
    assert regularizer.forces("second").tolist() == pytest.approx([r * 8 / 14 for r in range(7, -1, -1)])


def test_methods_that_look_at_no_importance():
    """Network slimming drops groups without a gain, and their importance; what has no pivot refuses one."""
    given = {"first": torch.arange(6.0), "second": torch.arange(8.0)}
    model = network()
    slim = make("slimming", model, groups(), force="linear", pivot="ordered", importance=given)
    assert slim.forces("first").tolist() == [5, 4, 3, 2, 1, 0]
    ordered = tuple(replace(group, pivot="ordered") for group in groups())
    for method, options in (("group_lasso", {"importance": given}), ("greg", {"importance": given})):
        with pytest.raises(UsageError):
            make(method, model, ordered, **options)
    with pytest.raises(UsageError):
        make("greg", model, groups(), relative=True)
    with pytest.raises(UsageError):
        distances(3, "network", torch.arange(3.0))


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
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    other = make("group_lasso", model, declared, relative=True)
    assert other.forces("1").tolist() == pytest.approx([3.0] * 6)
    other.load_state_dict(regularizer.state_dict())
    assert other.forces("1").tolist() == pytest.approx([1.0] * 6)
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
