"""Mixed precision, gradient scaling, accumulation, compiled and wrapped networks: the force stays the same."""

import pytest
import torch
import two_processes
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from etp_deploy.errors import ModelError
from etp_deploy.training import Blueprint, Scheduled, TorqueRegularizer, coupled_groups, discover, make
from etp_deploy.training.wrapping import named_modules, named_parameters, parameter, plain_copy

RATE = 0.05


@pytest.fixture(scope="module")
def plan():
    """Blueprint and groups of the network."""
    return two_processes.plan()


def batches(epoch, count=4, size=16):
    """Bright noise and dark."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(count):
        wanted = torch.arange(size) % 2 * 2.0 - 1
        yield torch.randn(size, 1, 6, 6, generator=generator) + 3 * wanted.reshape(-1, 1, 1, 1), wanted


def loss_of(model, images, wanted):
    """The loss of a batch."""
    return nn.functional.mse_loss(model(images)[:, 0].float(), wanted)


def weights_of(model):
    """A flat copy of all weights."""
    return torch.cat([weight.detach().reshape(-1).clone() for _, weight in named_parameters(model)])


def test_the_penalty_is_computed_wide_under_autocast(plan):
    """Inside and outside of a bfloat16 region it has the same bits, and so have its gradients."""
    for method in ("etp", "etp_reference", "group_lasso"):
        found = []
        for enabled in (False, True):
            model = two_processes.network()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                value = make(method, model, plan[1], 0.02).penalty()
            value.backward()
            found.append((value.detach(), torch.cat([w.grad.reshape(-1) for w in model[0].parameters()])))
        assert found[0][0].dtype == found[1][0].dtype == torch.float32
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_gradient_scaler_changes_nothing():
    """With the scaler's factor told to `add_gradients`, scaled and plain training have the same bits."""
    found = []
    for factor in (None, 1024.0, 1024.0):
        model = two_processes.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        regularizer = make("etp", model, beta=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=factor or 1.0, enabled=factor is not None)
        told = scaler.get_scale() if len(found) < 2 else 1.0
        for images, wanted in batches(0):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, images, wanted)).backward()
            regularizer.add_gradients(told)
            scaler.step(optimizer)
            scaler.update()
        found.append(weights_of(model))
    plain, scaled, untold = found
    assert torch.equal(plain, scaled)
    assert not torch.allclose(plain, untold, atol=1e-4)


@pytest.mark.parametrize("proximal", [True, False])
def test_accumulated_batches_feel_the_force_once(proximal, plan):
    """Two half batches train as one whole; a force in each half is twice too strong."""

    def train(parts, *, each=False):
        model = two_processes.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        force = Scheduled(make("group_lasso", model, plan[1], 0.1 if proximal else 0.004), proximal=proximal)
        for epoch in range(2):
            for images, wanted in batches(epoch):
                optimizer.zero_grad()
                for own, answer in zip(images.chunk(parts), wanted.chunk(parts), strict=True):
                    (loss_of(model, own, answer) / parts).backward()
                    if each and not proximal:
                        force.add_gradients()
                    elif each:
                        force.regularizer.shrink(RATE)
                if not proximal and not each:
                    force.add_gradients()
                optimizer.step()
                if proximal and not each:
                    force.step(RATE)
            force.update()
        return weights_of(model), force.history[-1].dead

    (one, died), (two, dead), (wrong, _) = train(1), train(2), train(2, each=True)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert died == dead
    assert (died > 0) == proximal
    assert not torch.allclose(one, wrong, atol=1e-3)


def compiled():
    """The whole network compiled."""
    return torch.compile(two_processes.network(), backend="eager")


def piecewise():
    """One layer compiled, and activation checkpoints of another."""
    model = two_processes.network()
    model[2] = torch.compile(model[2], backend="eager")
    model[6] = checkpoint_wrapper(model[6])
    return model


@pytest.mark.parametrize("wrap", [compiled, piecewise])
def test_a_compiled_network_dies_alike(wrap, plan):
    """The force acts on the compiled network's own weights, under the plain network's names."""
    blueprint, groups = plan
    plain = two_processes.Training(two_processes.network(), groups, blueprint=blueprint, beta=0.05).epochs(
        0, 5
    )
    model = wrap()
    assert {name for name, _ in model.named_parameters()} != {name for name, _ in named_parameters(model)}
    other = two_processes.Training(model, groups, blueprint=blueprint, beta=0.05).epochs(0, 5)
    one, two = plain.found(), other.found()
    assert all(torch.equal(one["dead"][name], two["dead"][name]) for name in one["dead"])
    assert sum(int(gone.sum()) for gone in one["dead"].values()) > 0
    torch.testing.assert_close(weights_of(plain.model), weights_of(model), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrap", [compiled, piecewise, lambda: nn.DataParallel(piecewise())])
def test_wrappers_are_looked_through(wrap, plan):
    """Names, order, discovery, and groups from the surgery are the plain network's."""
    plain, model = two_processes.network(), wrap()
    assert [name for name, _ in named_modules(model)] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in named_parameters(model)] == [name for name, _ in plain.named_parameters()]
    assert discover(model) == discover(plain)
    assert coupled_groups(model, two_processes.INPUT) == plan[1]
    assert Blueprint(model, two_processes.INPUT).shapes == plan[0].shapes
    twin = plain_copy(model)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert torch.equal(weights_of(twin), weights_of(model))


def test_a_module_of_ones_own_may_be_called_module():
    """Only wrappers are looked through, not names."""
    model = nn.ModuleDict({"module": nn.Linear(3, 4)})
    assert parameter(model, "module.weight") is model["module"].weight
    for name in ("weight", "module.gain", "module.inner.weight"):
        with pytest.raises(ModelError, match="no such parameter"):
            parameter(model, name)


def test_a_parameter_of_another_shape_is_refused():
    """Weights that were replaced since the regulariser was made are not guessed at."""
    model = two_processes.network()
    regularizer = TorqueRegularizer(model)
    model[6] = nn.Linear(72, 21)
    with pytest.raises(ModelError, match=r"6.weight: its shape was \(20, 72\) and is \(21, 72\)"):
        regularizer.clip()


@pytest.mark.parametrize("norm", ["l2_squared", "l2", "l1", "mean_l1"])
def test_a_step_on_narrow_weights_is_the_wide_one_rounded(norm):
    """A factor of 0.998 is 1 in bfloat16, but not every weight times it is the weight."""
    torch.manual_seed(0)
    narrow = nn.Linear(64, 8, bias=False).bfloat16()
    wide = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        wide.weight.copy_(narrow.weight)
        narrow.weight[0, 0] = wide.weight[0, 0] = 2.0**-40
    before = narrow.weight.detach().clone()
    for model in (narrow, wide):
        beta = 0.1 if norm == "mean_l1" else 1e-3
        TorqueRegularizer(model, beta=beta, norm=norm, force="uniform").shrink(1.0)
    assert torch.equal(narrow.weight, wide.weight.bfloat16())
    assert (narrow.weight != before).any()
    assert (narrow.weight[0, 0] == 0) == (norm in {"l1", "mean_l1"})
