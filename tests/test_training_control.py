"""The controller, its costs, schedules and the log."""

import copy
import math
from xml.dom import minidom

import numpy as np
import pytest
import torch
from torch import nn

from etp_deploy.errors import UsageError
from etp_deploy.training import (
    Blueprint,
    Controller,
    Cost,
    Group,
    LatencyCost,
    Part,
    PlannedCost,
    Recorder,
    Schedule,
    Scheduled,
    TorqueRegularizer,
    coupled_groups,
    removable_share,
)
from etp_deploy.training.cost import parse_target
from etp_deploy.training.recording import read_rows, table


def network():
    """Two convolutions with BatchNorm and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


INPUT = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def plan():
    """The network's blueprint and groups, which do not depend on weights."""
    blueprint = Blueprint(network(), INPUT)
    return blueprint, coupled_groups(network(), None, blueprint=blueprint)


class Training:
    """A few steps an epoch on four kinds of noise, the same whenever and wherever it is resumed."""

    def __init__(self, plan, target, **options):
        blueprint, groups = plan
        self.net = network()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        regularizer = TorqueRegularizer(self.net, beta=0.02, norm="l2", groups=groups)
        self.controller = Controller(regularizer, target, **{"updates": 6, "blueprint": blueprint, **options})

    def epoch(self, number):
        """Train for one epoch and update."""
        generator = torch.Generator().manual_seed(number)
        self.net.train()
        for _ in range(4):
            labels = torch.arange(16) % 4
            images = torch.randn(16, 1, 8, 8, generator=generator) + labels.reshape(-1, 1, 1, 1)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(images), labels).backward()
            self.optimizer.step()
            self.controller.step(0.05)
        return self.controller.update()


@pytest.mark.parametrize("target", ["params:0.5", "macs:0.25"])
def test_the_target_is_reached_by_as_little_as_possible(target, plan):
    """At the last update the cost is at or below the target, with the last module killed above it."""
    kind, wanted = parse_target(target)
    training = Training(plan, target)
    found = [training.epoch(number) for number in range(8)]
    blueprint = plan[0]
    zero = blueprint.zeros_of(training.net)
    dense, now = blueprint.price(np.zeros_like(zero)), blueprint.price(zero)
    ratio = now.parameters / dense.parameters if kind == "params" else now.macs / dense.macs
    last = next(update for update in found if update.done)
    assert last.ratio == pytest.approx(ratio)
    assert ratio <= wanted
    if last.killed:
        # one channel is at most 9 * 16 + 2 + 9 weights, one twelfth of the multiply-accumulates
        assert ratio > wanted - (0.09 if kind == "params" else 1 / 12)
    assert [update.done for update in found] == [update.number >= last.number for update in found]
    assert found[-1].dead == last.dead


def test_beta_follows_the_course(plan):
    """Nothing dead: beta grows by no more than half an update; all dead at once: the force ends."""
    costs = iter([0.1, 1.0, 0.4])  # the first is that of what can go

    class Given(Cost):
        """Costs from a list."""

        def ratio(self, model, zero):
            """The next."""
            del model, zero
            return next(costs)

    regularizer = TorqueRegularizer(network(), beta=1e-9, norm="l2", groups=plan[1])
    controller = Controller(regularizer, "params:0.5", updates=4, cost=Given())
    controller.step(0.1)
    assert not controller.update().done
    assert controller.base == pytest.approx(1e-9 * math.exp(0.25))
    assert controller.update().done
    assert regularizer.beta == 0.0
    controller.proximal = False
    assert float(controller.penalty()) == 0.0


def test_the_force_ends_and_the_dead_stay(plan):
    """After the target later epochs train the rest and leave the dead at zero."""
    training = Training(plan, "params:0.5", updates=2)
    for number in range(2):
        training.epoch(number)
    before = {name: weight.detach().clone() for name, weight in training.net.named_parameters()}
    training.epoch(2)
    for name, weight in training.net.named_parameters():
        assert torch.equal(weight == 0, before[name] == 0), name
        assert not torch.equal(weight, before[name]), name


def test_resuming_gives_the_same_weights(plan):
    """A run that is cut off and resumed from its checkpoint ends with the same bits as one that is not."""
    whole = Training(plan, "params:0.5", schedule=Schedule(20, warmup=0.1, ramp=0.2))
    for number in range(7):
        if number == 3:
            saved = {
                "net": {key: value.clone() for key, value in whole.net.state_dict().items()},
                "optimizer": whole.optimizer.state_dict(),
                "controller": whole.controller.state_dict(),
            }
            saved = copy.deepcopy(saved)
        whole.epoch(number)
    resumed = Training(plan, "params:0.5", schedule=Schedule(20, warmup=0.1, ramp=0.2))
    resumed.net.load_state_dict(saved["net"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.controller.load_state_dict(saved["controller"])
    for number in range(3, 7):
        resumed.epoch(number)
    for one, other in zip(whole.net.state_dict().values(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert whole.controller.history == resumed.controller.history
    assert whole.controller.history[3].dead > 0


def test_latency_is_measured_on_the_compressed_network():
    """The controller kills by score until the compressed file takes half of the dense one's time, and no more."""
    net = nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Conv2d(96, 4, 3))
    inputs = torch.zeros(1, 3, 24, 24)
    cost = LatencyCost(net, inputs, rounds=5)
    groups = coupled_groups(net, inputs)
    regularizer = TorqueRegularizer(net, groups=groups)
    blueprint = Blueprint(net, inputs)
    none = blueprint.zeros_of(net)
    assert cost.ratio(net, none) == pytest.approx(1.0, abs=0.25)
    controller = Controller(regularizer, "latency:0.5", updates=1, cost=cost)
    controller.step(0.0)
    found = controller.update()
    assert found.done
    assert found.ratio <= 0.5
    assert 0.35 < cost.ratio(net, blueprint.zeros_of(net)) < 0.65
    # 96 x 96 filters of 3 x 3 are the most of it, and half of the time takes about 0.7 of the channels on both sides
    assert 20 < found.killed < 160
    assert sum(int(dead.sum()) for dead in regularizer.dead().values()) == found.killed


@pytest.mark.parametrize("text", ["params", "params:0", "params:1.5", "bytes:0.5", "macs:half"])
def test_targets_that_cannot_be_meant(text):
    """A target has a kind and a ratio between 0 and 1."""
    with pytest.raises(UsageError):
        parse_target(text)


def test_a_controller_needs_something_to_price_with(plan):
    """Latency needs example inputs, everything else at least a blueprint."""
    regularizer = TorqueRegularizer(network(), groups=plan[1])
    for target, options in (("latency:0.5", {"blueprint": plan[0]}), ("params:0.5", {})):
        with pytest.raises(UsageError):
            Controller(regularizer, target, updates=3, **options)
    with pytest.raises(UsageError):
        Controller(regularizer, "params:0.5", updates=0, blueprint=plan[0])


def test_what_prices_is_told_once_and_fits(plan):
    """A blueprint is no use beside a cost, and one of another network would price anything."""
    regularizer = TorqueRegularizer(network(), groups=plan[1])
    cost = LatencyCost(network(), INPUT)
    with pytest.raises(UsageError, match="by itself"):
        Controller(regularizer, "params:0.5", updates=3, cost=cost, blueprint=plan[0])
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    wrong = TorqueRegularizer(other)
    for use in (
        lambda: Controller(wrong, "params:0.5", updates=3, blueprint=plan[0]),
        lambda: coupled_groups(other, None, blueprint=plan[0]),
        lambda: plan[0].zeros_of(other),
    ):
        with pytest.raises(UsageError, match="another network"):
            use()
    for use in (
        lambda: coupled_groups(network(), None, dynamic=["x.0=batch"], blueprint=plan[0]),
        lambda: removable_share(network(), blueprint=plan[0], exporter="dynamo"),
    ):
        with pytest.raises(UsageError, match="before"):
            use()


class Tied(nn.Module):
    """Two layers of one weight; the network's own name for it is the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        """Scores of x."""
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_tied_weight_is_priced_under_any_of_its_names(name):
    """Killing by the second name is seen in the cost: the target is reached by as little as possible."""
    torch.manual_seed(0)
    net = Tied()
    groups = (Group("g", "neurons", (Part(f"{name}.weight"), Part("last.weight", axis=1))),)
    regularizer = TorqueRegularizer(net, groups=groups)
    controller = Controller(regularizer, "params:0.7", updates=1, example_inputs=torch.randn(1, 6))
    found = controller.update()
    # k of both weights' six lines in each axis are gone: (6 - k) * 6 and (6 - k) * 6 of 72 stay, or fewer
    assert (found.killed, found.dead) == (2, 2)
    assert found.ratio <= 0.7


def test_a_warm_up_teaches_nothing(plan):
    """While there is no force beta stays, and the update says that there was none."""
    training = Training(plan, "params:0.5", schedule=Schedule(8, warmup=0.5))
    found = training.epoch(0)
    assert (found.beta, found.ratio) == (0.0, 1.0)
    assert training.controller.base == 0.02
    before = training.epoch(1)
    assert (before.beta, before.done) == (0.02, True)


def test_a_target_out_of_reach_is_refused(plan):
    """What no group holds, here two thirds of the weights, cannot go; the error says how much is left."""
    regularizer = TorqueRegularizer(network(), groups=plan[1][:1])
    with pytest.raises(UsageError, match="out of reach") as caught:
        Controller(regularizer, "params:0.05", updates=3, blueprint=plan[0])
    # one of twelve channels: 9 + 2 + 16 * 9 weights, and 32 + 68 that no kept channel is part of
    assert f"{(9 + 2 + 144 + 32 + 68) / plan[0].total:.3f}" in str(caught.value.hint)


def test_a_cost_of_ones_own_is_asked_whether_it_can_reach_the_target(plan):
    """One that cannot is refused before any training, as the built-in ones are."""

    class Constant(Cost):
        """Nothing makes it less."""

        def ratio(self, model, zero):
            """Return the dense cost."""
            del model, zero
            return 1.0

    regularizer = TorqueRegularizer(network(), groups=plan[1])
    with pytest.raises(UsageError, match="out of reach") as caught:
        Controller(regularizer, "latency:0.5", updates=3, cost=Constant())
    assert "1.000 of the dense" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("target", "given", "where"),
    [
        ("params:0.5", ("blueprint", "exporter"), "exporter"),
        ("params:0.5", ("blueprint", "example_inputs"), "example_inputs"),
        ("latency:0.5", ("blueprint", "example_inputs"), "blueprint"),
        ("params:0.5", ("cost", "exporter"), "cost"),
        ("params:0.5", ("blueprint", "gain"), "gain"),
    ],
)
def test_options_that_would_not_be_looked_at_are_refused(target, given, where, plan):
    """Nothing that was asked for is left undone in silence."""
    options = {"blueprint": plan[0], "exporter": "dynamo", "example_inputs": INPUT, "gain": math.nan}
    options["cost"] = PlannedCost(plan[0], "params")
    regularizer = TorqueRegularizer(network(), groups=plan[1])
    with pytest.raises(UsageError) as caught:
        Controller(regularizer, target, updates=3, **{name: options[name] for name in given})
    assert caught.value.where == where


def test_an_exporter_beside_a_blueprint_is_refused(plan):
    """The export was made before."""
    with pytest.raises(UsageError, match="exporter: the blueprint was exported before"):
        coupled_groups(network(), None, blueprint=plan[0], exporter="dynamo")


@pytest.mark.parametrize("method", ["penalty", "add_gradients"])
def test_the_force_acts_once(method, plan):
    """A force that shrinks the weights has no place in the loss or the gradients as well."""
    force = Scheduled(TorqueRegularizer(network(), groups=plan[1]))
    with pytest.raises(UsageError, match="would act twice"):
        getattr(force, method)()


def test_a_penalty_to_look_at_is_none_in_the_loss(plan):
    """Without gradients nothing acts twice, and a log may have the number."""
    force = Scheduled(TorqueRegularizer(network(), groups=plan[1]))
    with torch.no_grad():
        assert float(force.penalty()) == float(force.regularizer.penalty()) > 0


def test_schedule():
    """Warm-up, ramp, full strength, half a cosine down, nothing after."""
    schedule = Schedule(100, warmup=0.1, ramp=0.2, anneal=0.4)
    shares = {
        0: 0,
        9: 0,
        10: 0,
        20: 0.5,
        30: 1,
        60: 1,
        70: 0.5 + 0.5 * math.cos(math.pi / 4),
        80: 0.5,
        100: 0,
    }
    for step, share in shares.items():
        assert schedule.share(step) == pytest.approx(share), step
    assert Schedule(3).share(2) == 1.0
    assert Schedule(100, warmup=0.33, ramp=0.56, anneal=0.11).share(89) == 1.0  # which add up to more than 1
    assert Schedule(3).share(3) == 0.0
    for wrong in ({"steps": 0}, {"steps": 5, "ramp": -0.1}, {"steps": 5, "ramp": 0.7, "anneal": 0.6}):
        with pytest.raises(UsageError):
            Schedule(**wrong)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_log_reads_back_and_continues(suffix, tmp_path, plan):
    """Rows on disk are the rows in memory; a run that resumes earlier replaces what it repeats."""
    regularizer = TorqueRegularizer(network(), beta=0.5, force="linear", groups=plan[1])
    path = tmp_path / f"log.{suffix}"
    recorder = Recorder(path)
    recorder.record(1, regularizer)
    regularizer.kill("0", [3, 4])
    recorder.record(2, regularizer)
    assert read_rows(path) == recorder.rows
    first, second = (row for row in recorder.rows if row.group == "0")
    assert (first.dead, second.dead, second.total, second.min_norm) == (0, 2, 12, 0.0)
    assert (first.min_force, first.max_force) == (0.0, 5.5)
    again = Recorder(path)
    again.record(2, regularizer)
    assert again.rows == recorder.rows == read_rows(path)
    picture = minidom.parseString(again.picture())  # noqa: S318 - our own
    assert len(picture.getElementsByTagName("polyline")) == 2
    with pytest.raises(UsageError):
        Recorder(tmp_path / "log.txt")


def test_the_table_counts_the_living(plan):
    """One row for each group."""
    regularizer = TorqueRegularizer(network(), groups=plan[1])
    regularizer.kill("3", range(5))
    drawn = table(regularizer.statistics())
    assert list(drawn.columns[2].cells) == ["12", "11"]
