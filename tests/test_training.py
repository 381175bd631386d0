"""The torque regulariser against loops that follow the paper's formula word by word."""

import math

import pytest
import torch
from torch import nn

from etp_deploy.errors import ModelError, UsageError
from etp_deploy.training import (
    Group,
    Part,
    SlimmingRegularizer,
    TorqueRegularizer,
    discover,
    neurons,
    packed_heads,
    separate_heads,
)


def convolutions():
    """Return a small network with filters of two sizes, a BatchNorm and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 5)
    )


def loop_penalty(weights, *, beta, force="exponential", norm="l2_squared", pivot=0, steepness=5.0):
    """The formula, one module at a time, in float64."""
    total = 0.0
    for weight in weights:
        count = len(weight)
        for i in range(count):
            module = weight[i].detach().double()
            size = {
                "l2_squared": module.square().sum(),
                "mean_l1": module.abs().mean(),
                "l2": math.sqrt(module.numel()) * module.square().sum().sqrt(),
            }[norm]
            distance = abs(i - pivot)
            pull = math.exp(steepness / count) ** distance if force == "exponential" else distance
            total += float(size) * pull
    return beta * total


@pytest.mark.parametrize("force", ["exponential", "linear"])
@pytest.mark.parametrize("norm", ["l2_squared", "mean_l1", "l2"])
@pytest.mark.parametrize("pivot", [0, 2])
def test_penalty_is_the_formula(force, norm, pivot):
    """The vectorised penalty equals the loop for each force, norm and pivot."""
    model = convolutions()
    options = {"steepness": 5.0} if force == "exponential" else {}
    regularizer = TorqueRegularizer(model, beta=0.3, force=force, norm=norm, pivot=pivot, **options)
    weights = [model[0].weight, model[3].weight, model[5].weight]
    wanted = loop_penalty(weights, beta=0.3, force=force, norm=norm, pivot=pivot)
    assert float(regularizer.penalty().detach()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"force": "linear", "steepness": 5.0},
        {"force": "linear", "keep": 0.5},
        {"force": "uniform", "keep": 0.5},
        {"force": "uniform", "pivot": "ordered"},
        {"steepness": math.nan},
        {"steepness": -1.0},
        {"keep": 0.02},
    ],
)
def test_options_that_the_force_would_not_look_at_or_cannot_bear(options):
    """Nothing is ignored in silence, and no force is infinite in float32; each force's own options do."""
    with pytest.raises(UsageError):
        TorqueRegularizer(nn.Linear(2, 1000), **options)
    TorqueRegularizer(nn.Linear(2, 1000), force="linear", pivot="ordered")
    TorqueRegularizer(nn.Linear(2, 1000), keep=0.05)


def test_a_module_without_weights_makes_no_nan():
    """A listed index may leave a module out; the mean over its weights is no weight's."""
    model = nn.Linear(2, 3)
    group = Group("g", "neurons", (Part("weight", index=(0, 2, 2)),))
    regularizer = TorqueRegularizer(model, beta=1.0, norm="mean_l1", steepness=0.0, groups=[group])
    rows = model.weight.detach().abs()
    assert float(regularizer.penalty().detach()) == pytest.approx(float(rows[0].mean() + rows[1:].mean()))
    regularizer.shrink(0.01)
    assert model.weight.isfinite().all()


def test_every_batch_norm_is_known():
    """The gain of a BatchNorm over processes is found like any other's."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    other = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(other[1], nn.SyncBatchNorm)
    (group,) = discover(other, include_norm=True)
    assert [part.parameter for part in group.parts] == ["0.weight", "1.weight"]
    assert SlimmingRegularizer(other).scores()["0"].tolist() == [1.0] * 4


def test_defaults_are_the_papers():
    """Without options: squared L2, lambda = exp(5 / n), pivot 0, single weights clipped at 5e-4."""
    model = nn.Linear(3, 10)
    regularizer = TorqueRegularizer(model, beta=1.0)
    assert regularizer.threshold == 5e-4
    wanted = loop_penalty([model.weight], beta=1.0)
    assert float(regularizer.penalty().detach()) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(
        regularizer.forces(""), torch.exp(torch.arange(10, dtype=torch.float64) * 5 / 10)
    )


def test_mean_l1_takes_the_reference_codes_lambda():
    """The norm mean_l1 uses 1.01 ** (500 / n) unless a steepness is given."""
    model = nn.Linear(3, 10)
    forces = TorqueRegularizer(model, norm="mean_l1").forces("")
    assert float(forces[7]) == pytest.approx((1.01 ** (500 / 10)) ** 7)
    steep = TorqueRegularizer(model, norm="mean_l1", steepness=5.0).forces("")
    assert float(steep[7]) != pytest.approx(float(forces[7]), rel=1e-3)


@pytest.mark.parametrize(("pivot", "origin"), [(0, 0), (-1, 6), ("middle", 3), (2, 2)])
def test_pivot_feels_the_least(pivot, origin):
    """Force grows with the distance from the pivot, on both sides alike."""
    forces = TorqueRegularizer(nn.Linear(2, 7), force="linear", pivot=pivot).forces("")
    assert forces.tolist() == [abs(i - origin) for i in range(7)]


def test_pivot_of_a_group_comes_first():
    """A pivot that a group names overrides the regulariser's."""
    group = Group("g", "neurons", (Part("weight"),), pivot=4)
    forces = TorqueRegularizer(nn.Linear(2, 5), force="linear", pivot=1, groups=[group]).forces("g")
    assert forces.tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("norm", ["l2_squared", "mean_l1", "l2"])
def test_gradient(norm):
    """The penalty's gradient is that of finite differences."""
    model = nn.Linear(3, 4).double()
    regularizer = TorqueRegularizer(model, beta=0.1, norm=norm)

    def penalty(weight):
        with torch.no_grad():
            model.weight.copy_(weight)
        model.zero_grad()
        value = regularizer.penalty()
        value.backward()
        return float(value.detach()), model.weight.grad.clone()

    start = model.weight.detach().clone()
    _, gradient = penalty(start)
    for index in ((0, 0), (1, 2), (3, 1)):
        step = torch.zeros_like(start)
        step[index] = 1e-6
        slope = (penalty(start + step)[0] - penalty(start - step)[0]) / 2e-6
        assert slope == pytest.approx(float(gradient[index]), rel=1e-5)


def test_gradient_of_a_dead_module_is_finite():
    """The root in the norm l2 gives no NaN at a module that is zero."""
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.weight[1] = 0
    TorqueRegularizer(model, norm="l2").penalty().backward()
    assert torch.isfinite(model.weight.grad).all()
    assert not model.weight.grad[1].any()
    assert model.weight.grad[0].all()


def test_half_precision_sums_in_single():
    """Half-precision weights whose squares would overflow in half give a finite float32 penalty."""
    model = nn.Linear(4, 4).half()
    with torch.no_grad():
        model.weight.fill_(300.0)
    penalty = TorqueRegularizer(model).penalty()
    assert penalty.dtype == torch.float32
    assert torch.isfinite(penalty)


def test_clip_gives_exact_zeros_and_touches_nothing_else():
    """Weights below the threshold become 0.0; weights at or above it, and biases, keep their bits."""
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4e-4, -4e-4], [5e-4, 1e-5], [-0.2, 0.3]]))
        model.bias.fill_(1e-6)
    before = model.weight.detach().clone()
    dead = TorqueRegularizer(model).clip()
    assert dead == 1
    assert model.weight.tolist() == [[0.0, 0.0], [float(before[1, 0]), 0.0], before[2].tolist()]
    assert bool((model.bias == torch.tensor(1e-6)).all())


def test_clip_by_module_keeps_small_weights_of_large_modules():
    """With clip_by="module" a small weight survives among large ones and a small module goes whole."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e-5, 1.0], [4e-4, 3e-4]]))
    assert TorqueRegularizer(model, clip_by="module").clip() == 1
    assert model.weight[0, 0] != 0
    assert not model.weight[1].any()


def test_clip_by_module_follows_one_decisive_part():
    """A neuron that nobody reads loses its row too; its bias stays out of it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 1e-5
    regularizer = TorqueRegularizer(model, groups=[neurons("hidden", "0", "2")], clip_by="module")
    assert regularizer.clip() == 1
    assert not model[0].weight[1].any()
    assert not model[2].weight[:, 1].any()
    assert model[0].bias.all()
    assert model[0].weight[[0, 2]].all()


def test_discovery_covers_layers_once_and_honours_exclude():
    """Convolutions and linear layers are found in order; an excluded one is not."""
    groups = discover(convolutions(), exclude=["5"])
    assert [(group.name, group.kind) for group in groups] == [("0", "channels"), ("3", "channels")]
    assert [part.parameter for group in groups for part in group.parts] == ["0.weight", "3.weight"]


def test_discovery_of_convolutions_of_all_kinds():
    """One to three dimensions and transposed ones count output channels; a grouped transposed one is none."""
    model = nn.ModuleDict(
        {
            "one": nn.Conv1d(2, 3, 3),
            "three": nn.Conv3d(2, 4, 1),
            "depthwise": nn.Conv2d(5, 5, 3, groups=5),
            "up": nn.ConvTranspose2d(2, 7, 3),
            "grouped": nn.ConvTranspose2d(4, 4, 3, groups=2),
        }
    )
    counts = {group.name: group.count(model) for group in discover(model)}
    assert counts == {"one": 3, "three": 4, "depthwise": 5, "up": 7}


def test_norm_and_bias_join_the_module():
    """include_norm adds the gain of the BatchNorm that follows, include_bias both biases."""
    model = convolutions()
    plain, normed, biased = (
        discover(model, include_norm=norm, include_bias=bias)[0].parts
        for norm, bias in ((False, False), (True, False), (True, True))
    )
    assert [part.parameter for part in plain] == ["0.weight"]
    assert [part.parameter for part in normed] == ["0.weight", "1.weight"]
    assert [part.parameter for part in biased] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [part.decisive for part in biased] == [True, False, True, False]


def test_norm_of_another_width_is_not_taken():
    """A BatchNorm with other than the layer's channels does not join it."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(3))
    assert [part.parameter for part in discover(model, include_norm=True)[0].parts] == ["0.weight"]


class PackedAttention(nn.Module):
    """Attention in the manner of timm."""

    def __init__(self):
        super().__init__()
        self.num_heads = 3
        self.qkv = nn.Linear(5, 3 * 3 * 2)
        self.proj = nn.Linear(6, 5)


@pytest.mark.parametrize(
    ("model", "kept_dim"),
    [
        (nn.MultiheadAttention(6, 3), 2),
        (nn.MultiheadAttention(6, 3, kdim=4, vdim=5), 2),
        (PackedAttention(), 2),
    ],
    ids=["packed", "separate", "timm"],
)
def test_heads_are_whole(model, kept_dim):
    """An attention is one group of heads, a head being its rows of q, k, v and its columns."""
    (group,) = discover(model)
    assert (group.kind, group.count(model)) == ("heads", 3)
    regularizer = TorqueRegularizer(model, clip_by="module", threshold=1e-3)
    with torch.no_grad():
        for part in group.parts:
            weight = model.get_parameter(part.parameter)
            weight.index_fill_(part.axis, torch.nonzero(part.modules(weight) == 1).reshape(-1), 1e-5)
    assert regularizer.clip() == 1
    rows = slice(kept_dim, 2 * kept_dim)
    output = model.out_proj.weight if isinstance(model, nn.MultiheadAttention) else model.proj.weight
    assert not output[:, rows].any()
    assert output[:, :kept_dim].all()
    assert output[:, 2 * kept_dim :].all()
    packed = model.in_proj_weight if isinstance(model, nn.MultiheadAttention) else model.qkv.weight
    separate = [model.q_proj_weight, model.k_proj_weight, model.v_proj_weight] if packed is None else None
    projections = separate or packed.chunk(3)
    for weight in projections:
        assert not weight[rows].any()
        assert weight[:kept_dim].all()
        assert weight[2 * kept_dim :].all()


def test_a_head_torque_counts_each_weight_once():
    """The torque of packed heads is that of a loop over heads with q, k, v and output together."""
    model = PackedAttention()
    wanted = 0.0
    query, key, value = (weight.view(3, 2, 5) for weight in model.qkv.weight.detach().chunk(3))
    output = model.proj.weight.detach().view(5, 3, 2)
    for head in range(3):
        square = sum(float(w[head].square().sum()) for w in (query, key, value))
        wanted += (square + float(output[:, head].square().sum())) * math.exp(5 / 3) ** head
    assert float(TorqueRegularizer(model, beta=1.0).penalty().detach()) == pytest.approx(wanted, rel=1e-5)


def test_zero_queries_leave_a_head_alive():
    """Only value rows or output columns make a head dead: zero query rows leave a uniform attention."""
    model = PackedAttention()
    regularizer = TorqueRegularizer(model)
    with torch.no_grad():
        model.qkv.weight[:6] = 0
    assert regularizer.dead()[""].tolist() == [False] * 3
    with torch.no_grad():
        model.qkv.weight[12:14] = 0
        model.proj.weight[:, 4:] = 0
    assert regularizer.dead()[""].tolist() == [True, False, True]


def test_separate_heads_equal_packed_heads():
    """The same attention declared with three layers and with one packed weight has the same penalty."""
    packed = PackedAttention()
    separate = nn.ModuleDict({name: nn.Linear(5, 6) for name in "qkv"} | {"out": packed.proj})
    with torch.no_grad():
        for name, rows in zip("qkv", packed.qkv.weight.chunk(3), strict=True):
            separate[name].weight.copy_(rows)
    one = TorqueRegularizer(packed, groups=[packed_heads("a", "qkv.weight", "proj.weight", 3, 2)])
    two = TorqueRegularizer(separate, groups=[separate_heads("a", "qkv", "out", 3, 2)])
    torch.testing.assert_close(one.penalty(), two.penalty())


def test_user_group_of_several_parameters():
    """A residual width declared over a row axis, a column axis and a bias is clipped as one."""
    model = nn.ModuleDict({"into": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    parts = (Part("into.weight"), Part("into.bias", decisive=False), Part("out.weight", axis=1))
    regularizer = TorqueRegularizer(
        model, groups=[Group("width", "channels", parts)], clip_by="module", threshold=1e-3
    )
    with torch.no_grad():
        model["into"].weight[2] = 1e-6
    assert regularizer.clip() == 1
    assert model["into"].bias[2] == 0
    assert not model["out"].weight[:, 2].any()
    assert model["into"].bias[[0, 1, 3]].all()


@pytest.mark.parametrize(
    "part",
    [
        Part("missing"),
        Part("weight", axis=2),
        Part("weight", split=(2, 2)),
        Part("weight", split=(2, 3), position=2),
        Part("weight", split=(2, 3), position=1, section=2),
        Part("weight", split=(2, 3), position=0, section=1),
    ],
)
def test_parts_that_do_not_fit_are_refused(part):
    """A declaration that contradicts the model is an error that names the parameter."""
    with pytest.raises(ModelError) as caught:
        TorqueRegularizer(nn.Linear(4, 6), groups=[Group("g", "neurons", (part,))])
    assert caught.value.where == part.parameter


def test_parts_that_disagree_are_refused():
    """Parts of one group must count the same number of modules."""
    with pytest.raises(ModelError, match="modules"):
        Group("g", "neurons", (Part("weight"), Part("weight", axis=1))).count(nn.Linear(4, 6))


@pytest.mark.parametrize(
    "options",
    [
        {"beta": -1.0},
        {"beta": math.nan},
        {"threshold": -1e-4},
        {"force": "cubic"},
        {"norm": "l0"},
        {"clip_by": "row"},
        {"pivot": 6},
        {"groups": [neurons("g", "x")], "exclude": ["x"]},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options):
    """Every wrong option is a usage error."""
    with pytest.raises(UsageError):
        TorqueRegularizer(nn.Linear(4, 6), **options)


def test_unknown_exclude_is_refused():
    """A misspelt layer in exclude is an error, not silence."""
    with pytest.raises(ModelError, match="exclude"):
        discover(nn.Linear(4, 6), exclude=["head"])


@pytest.mark.parametrize("norm", ["l2_squared", "mean_l1", "l2"])
def test_shrink_minimises_its_proximal_objective(norm):
    """A proximal step ends where penalty plus half the squared distance has its minimum."""
    torch.manual_seed(1)
    model = nn.Linear(3, 4, bias=False).double()
    regularizer = TorqueRegularizer(model, beta=0.05, norm=norm)
    start = model.weight.detach().clone()
    regularizer.shrink(0.5)
    found = model.weight.detach().clone()

    def objective(weight):
        with torch.no_grad():
            model.weight.copy_(weight)
        return float(0.5 * regularizer.penalty().detach() + (weight - start).square().sum() / 2)

    least = objective(found)
    for _ in range(50):
        assert objective(found + 1e-3 * torch.randn(4, 3, dtype=torch.float64)) >= least
    assert objective(start) > least


def test_shrink_reaches_exact_zero():
    """A proximal step that is larger than a module's norm leaves zeros, no small opposite numbers."""
    for norm in ("mean_l1", "l2"):
        model = nn.Linear(3, 4)
        TorqueRegularizer(model, beta=1e3, norm=norm).shrink(1.0)
        assert not model.weight.any()


def test_frozen_modules_stay_dead_under_momentum():
    """After freeze, hold undoes what the optimiser's momentum does to dead modules and only to them."""
    model = nn.Linear(3, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    regularizer = TorqueRegularizer(model)
    inputs = torch.ones(2, 3)

    def step():
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()

    step()
    with torch.no_grad():
        model.weight[2] = 0
    assert regularizer.freeze() == 1
    before = model.weight.detach().clone()
    step()
    assert model.weight[2].all()
    regularizer.hold()
    assert not model.weight[2].any()
    assert bool((model.weight[[0, 1, 3]] != before[[0, 1, 3]]).all())


def test_hold_without_freeze_is_refused():
    """There is nothing to hold before freeze."""
    with pytest.raises(UsageError):
        TorqueRegularizer(nn.Linear(2, 2)).hold()


def test_statistics():
    """Counts and norms are those of the modules, biases left out."""
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]]))
    (row,) = TorqueRegularizer(model).statistics()
    assert (row.name, row.kind, row.total, row.dead) == ("", "neurons", 3, 1)
    assert row.max_norm == pytest.approx(5.0)
    assert row.mean_norm == pytest.approx(2.0)


def test_torque_kills_the_far_modules_first():
    """Under torque alone the module at the pivot outlives the farthest; with beta 0 all live."""
    for beta, moved in ((1e-2, True), (0.0, False)):
        model = nn.Linear(4, 8)
        with torch.no_grad():
            model.weight.fill_(0.1)
        regularizer = TorqueRegularizer(model, beta=beta)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(40):
            optimizer.zero_grad()
            regularizer.penalty().backward()
            optimizer.step()
        regularizer.clip()
        dead = regularizer.dead()[""]
        assert bool(dead[-1]) is moved
        assert not dead[0]
        assert dead.tolist() == sorted(dead.tolist())
