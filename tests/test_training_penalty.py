"""The penalty in the loss: its gradient arrives, whole and once, however the backward pass is run."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from etp_deploy.training import Group, Part, TorqueRegularizer

NORMS = ("l2_squared", "l2", "l1", "mean_l1")
X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def network():
    """A convolution, and a linear layer, whose gradient arrives as a view."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 1))


def force_on(model, norm="l2"):
    """A strong force on the first two."""
    return TorqueRegularizer(model, beta=0.1, norm=norm, exclude=["4"])


def plainly(regularizer, model, norm):
    """The penalty by its definition, module by module, in ordinary operations."""
    sizes = {
        "l2_squared": lambda weight: weight.square().sum(),
        "l2": lambda weight: weight.norm() * weight.numel() ** 0.5,
        "l1": lambda weight: weight.abs().sum(),
        "mean_l1": lambda weight: weight.abs().mean(),
    }
    return regularizer.beta * sum(
        force.float() * sizes[norm](model.get_parameter(part.parameter).select(part.axis, index))
        for group in regularizer.groups
        for part in group.parts
        for index, force in enumerate(regularizer.forces(group.name))
    )


def wanted(norm="l2", *, batches=1, beta=0.1):
    """What the gradients have to be: the loss's and the plain penalty's."""
    model = network()
    regularizer = force_on(model, norm)
    regularizer.beta = beta
    for _ in range(batches):
        (model(X).square().sum() + plainly(regularizer, model, norm)).backward()
    return [weight.grad for weight in model.parameters()]


def same(found, expected):
    """Assert that gradients are what they have to be."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_gradients_are_those_of_the_loss_and_of_the_force(norm, first, batches):
    """Whichever term is made first, and where gradients are added up over batches."""
    model = network()
    regularizer = force_on(model, norm)
    for _ in range(batches):
        terms = [regularizer.penalty, lambda: model(X).square().sum()]
        made = [term() for term in (terms if first else terms[::-1])]
        sum(made).backward()
    same([weight.grad for weight in model.parameters()], wanted(norm, batches=batches))


def test_returned_gradients_hold_it():
    """`torch.autograd.grad` adds nothing up and leaves the weights' own gradients alone."""
    model = network()
    loss = model(X).square().sum() + force_on(model).penalty()
    same(torch.autograd.grad(loss, list(model.parameters())), wanted())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_pass_for_some_weights_touches_no_others():
    """`backward(inputs=...)`, and nothing of it is left for the next pass."""
    model = network()
    regularizer = force_on(model)
    chosen = [model[3].weight]
    (model(X).square().sum() + regularizer.penalty()).backward(inputs=chosen)
    same([model[3].weight.grad], [wanted()[2]])
    assert model[0].weight.grad is None
    model.zero_grad()
    model(X).square().sum().backward()
    assert not torch.allclose(model[0].weight.grad, wanted()[0])


def test_hooks_see_the_whole_gradient():
    """One on the gradient, and one after it was added up, as optimisers in the backward pass have."""
    model = network()
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    model[3].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    (model(X).square().sum() + force_on(model).penalty()).backward()
    expected = wanted()
    same(sorted(seen, key=len), sorted([expected[0], expected[2]], key=len))


def test_a_gradient_of_the_gradient_is_refused():
    """The closed form has none, and says so rather than leave the penalty out."""
    model = network()
    loss = model(X).square().sum() + force_on(model).penalty()
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


class Kept(torch.autograd.Function):
    """Gives as gradient what it still has."""

    HELD = torch.ones(4, 6)

    @staticmethod
    def forward(ctx, weight):
        """Sum up."""
        del ctx
        return weight.sum()

    @staticmethod
    def backward(ctx, slope):
        """Return what is held."""
        del ctx, slope
        return Kept.HELD


@pytest.mark.parametrize(
    "loss",
    [
        lambda one, other: (one + other).square().sum(),
        lambda one, other: (one.view(6, 4) + other.view(6, 4)).square().sum(),
        lambda one, other: (one[None] + other[None]).square().sum(),
        lambda one, other: one.sum() + other.sum(),
        lambda one, other: Kept.apply(one) + Kept.apply(other),
        lambda one, other: torch.cat([one, other]).square().sum(),
        lambda one, other: (one.t() @ other).square().sum(),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_shared_gradients_are_not_spoiled(loss, first):
    """Gradients that are one tensor, share memory, are broadcast, or that somebody keeps."""
    model = nn.Module()
    model.one, model.other = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))
    groups = [Group(name, "channels", (Part(name),)) for name in ("one", "other")]
    regularizer = TorqueRegularizer(model, beta=0.1, groups=groups)
    expected = [
        gradient + 0.2 * regularizer.forces(name).float()[:, None] * model.get_parameter(name)
        for name, gradient in zip(
            ("one", "other"),
            torch.autograd.grad(loss(model.one, model.other), (model.one, model.other)),
            strict=True,
        )
    ]
    terms = [regularizer.penalty, lambda: loss(model.one, model.other)]
    sum(term() for term in (terms if first else terms[::-1])).backward()
    same([model.one.grad, model.other.grad], expected)
    assert torch.equal(Kept.HELD, torch.ones(4, 6))


def test_weights_that_the_loss_does_not_read_get_it_too():
    """Alone, and added to a gradient that is there."""
    model = network()
    regularizer = force_on(model)
    regularizer.penalty().backward()
    once = [weight.grad.clone() for weight in (model[0].weight, model[3].weight)]
    regularizer.penalty().backward()
    other = network()
    for weight in other.parameters():
        weight.grad = torch.zeros_like(weight)
    force_on(other).add_gradients()
    assert other[0].weight.grad.any()
    same(once, [other[0].weight.grad, other[3].weight.grad])
    same([model[0].weight.grad, model[3].weight.grad], [2 * one for one in once])


def test_a_pass_that_fails_leaves_nothing_behind():
    """What waited for a gradient then does not add to a later one."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            del ctx
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            del ctx, slope
            raise ZeroDivisionError

    model = network()
    regularizer = force_on(model)
    loss = Fails.apply(model(X)).square().sum() + regularizer.penalty()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert not any(weight._backward_hooks for weight in model.parameters())
    model.zero_grad()
    (model(X).square().sum() + regularizer.penalty()).backward()
    same([weight.grad for weight in model.parameters()], wanted())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_within_the_pass(reentrant):
    """A reentrant one adds its weights' gradients up in a pass of its own."""
    model = network()
    x = X.clone().requires_grad_()
    features = checkpoint(model[:4], x, use_reentrant=reentrant)
    (model[4](features).square().sum() + force_on(model).penalty()).backward()
    same([weight.grad for weight in model.parameters()], wanted())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_penalty_within_a_checkpoint(reentrant):
    """What is recomputed is another tensor than the weight; the gradient is the weight's all the same."""
    model = network()
    regularizer = force_on(model)

    def loss(x):
        return model(x).square().sum() + regularizer.penalty()

    checkpoint(loss, X.clone().requires_grad_(), use_reentrant=reentrant).backward()
    same([weight.grad for weight in model.parameters()], wanted())


def test_saved_tensors_that_lie_elsewhere():
    """As `torch.autograd.graph.save_on_cpu` puts them: what comes back is a copy of the weight."""
    model = network()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        loss = model(X).square().sum() + force_on(model).penalty()
    loss.backward()
    same([weight.grad for weight in model.parameters()], wanted())


def test_the_default_device_is_no_matter():
    """The weights' own device counts."""
    model = network()
    regularizer = force_on(model)
    loss = model(X).square().sum()
    with torch.device("meta"):
        (loss + regularizer.penalty()).backward()
    same([weight.grad for weight in model.parameters()], wanted())


def test_a_graph_that_is_gone_through_twice():
    """With `retain_graph`, the gradients add up."""
    model = network()
    loss = model(X).square().sum() + force_on(model).penalty()
    loss.backward(retain_graph=True)
    loss.backward()
    same([weight.grad for weight in model.parameters()], [2 * gradient for gradient in wanted()])


def test_two_penalties_add_up():
    """Of two regularisers on the same weights."""
    model = network()
    first, second = force_on(model, "l2"), force_on(model, "mean_l1")
    (model(X).square().sum() + first.penalty() + second.penalty()).backward()
    one, two, none = wanted("l2"), wanted("mean_l1"), wanted(beta=0.0)
    same(
        [weight.grad for weight in model.parameters()],
        [a + b - c for a, b, c in zip(one, two, none, strict=True)],
    )


def test_a_sparse_gradient_gets_a_dense_one():
    """An embedding's, which hooks may not make dense."""
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True))
    groups = [Group("columns", "channels", (Part("0.weight", axis=1),))]
    regularizer = TorqueRegularizer(model, beta=0.1, groups=groups)
    (model(torch.tensor([1, 1, 2])).sum() + regularizer.penalty()).backward()
    rows = torch.tensor([0.0, 2, 1, 0, 0, 0])[:, None]
    expected = rows + 0.2 * regularizer.forces("columns").float() * model[0].weight.detach()
    torch.testing.assert_close(model[0].weight.grad.to_dense(), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_losses(whole):
    """A compiled network, and a loss that is compiled with its penalty."""
    model = network()
    regularizer = force_on(model)

    def loss():
        return model(X).square().sum() + regularizer.penalty()

    if whole:
        torch.compile(loss, backend="aot_eager")().backward()
    else:
        (torch.compile(model, backend="aot_eager")(X).square().sum() + regularizer.penalty()).backward()
    same([weight.grad for weight in model.parameters()], wanted())


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_scaled_losses_scale_it(scale):
    """As a gradient scaler or a share of a batch does."""
    model = network()
    ((model(X).square().sum() + force_on(model).penalty()) * scale).backward()
    same([weight.grad / scale for weight in model.parameters()], wanted())
