"""Groups from the surgery: what the analysis couples, and that all of it can be removed."""

import numpy as np
import pytest
import torch
from torch import nn
from zoo.export import export, weight_elements
from zoo.networks import ZOO

from etp_deploy.errors import ExportError, UsageError
from etp_deploy.pipeline import compress
from etp_deploy.training import (
    Blueprint,
    Price,
    SlimmingRegularizer,
    TorqueRegularizer,
    coupled_groups,
    discover,
    removable_share,
)

# the groups of each network; the widths of the zoo's definition, by kind
WANTED = {
    "resnet": {"channels": [12, 16, 16, 20, 24, 24, 28, 32, 32]},
    "mobilenetv2": {"channels": [8, 12, 16, 16, 48, 72, 72, 96], "neurons": [64]},
    "densenet": {"channels": [8, 8, 8, 12, 16, 16, 16, 16, 16], "neurons": [8]},
    "resnext": {"channels": [5, 5, 5, 5, 6, 6, 6, 6, 16, 32, 48]},
    # of the shuffled stream, what the next unit leaves alone and what it works on
    "shufflenetv2": {"channels": [8, 8, 12, 16, 20], "neurons": [32]},
    "vit-packed": {"heads": [4, 4], "neurons": [48, 64]},
    "lstm": {"units": [12, 16]},
    "llama": {"heads": [3, 4], "neurons": [32, 40, 48]},
}
# zeros of the recipe that prunes half of each layer's filters or neurons, the outputs' layer left out
SHARES = {"resnet": 0.6968, "mobilenetv2": 0.7515, "vit-packed": 0.3182, "densenet": 0.9890}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small networks are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def coupled():
    """A network of the zoo with its blueprint and groups, each made once."""
    made = {}

    def get(name):
        if name not in made:
            if ZOO[name].needs:
                pytest.importorskip(ZOO[name].needs)
            net = ZOO[name].build()
            plan = Blueprint(net, ZOO[name].draw(), exporter=ZOO[name].quickest)
            made[name] = plan, coupled_groups(net, None, blueprint=plan)
        return ZOO[name].build(), *made[name]

    return get


@pytest.mark.parametrize("name", WANTED)
def test_groups_are_the_widths_that_can_shrink(name, coupled):
    """Residual streams, depthwise chains, concatenations, key/value groups, units: each is one group."""
    net, _, groups = coupled(name)
    found = {}
    for group in groups:
        found.setdefault(group.kind, []).append(group.count(net))
    assert {kind: sorted(counts) for kind, counts in found.items()} == WANTED[name]


def test_heads_that_share_a_bias_are_one_module(coupled):
    """A head of every block reads the same column of the position bias: they can only go together."""
    net, plan, groups = coupled("t5")
    assert [(group.kind, group.count(net)) for group in groups] == [
        ("neurons", 64),
        ("neurons", 64),
        ("heads", 4),
    ]
    regularizer = TorqueRegularizer(net, groups=groups)
    regularizer.kill(groups[2].name, [1, 3])
    assert removable_share(net, blueprint=plan) == 1.0


@pytest.mark.parametrize("name", WANTED)
def test_what_is_zeroed_is_removed(name, coupled, tmp_path):
    """Half of every group, zeroed, leaves exactly the network of half the widths, with equal outputs."""
    net, plan, groups = coupled(name)
    regularizer = TorqueRegularizer(net, groups=groups)
    for group in groups:
        regularizer.kill(group.name, range(group.count(net) // 2))
    zero = plan.zeros_of(net)
    assert removable_share(net, blueprint=plan) == 1.0
    assert plan.price(zero).parameters == plan.total - zero.sum()
    kept = {
        key: width if key.startswith("per") else width - width // 2 for key, width in ZOO[name].widths.items()
    }
    native = ZOO[name].build(kept)
    assert plan.price(zero).parameters == sum(weight.numel() for weight in native.parameters())
    files = [tmp_path / f"{which}.onnx" for which in ("full", "small", "native")]
    for module, file in ((net, files[0]), (native, files[2])):
        export(module, ZOO[name], file, exporter=ZOO[name].quickest)
    compress(files[0], files[1], align="off", verify=name in {"resnet", "vit-packed"}, simplify=False)
    assert weight_elements(files[1]) == weight_elements(files[2])


@pytest.mark.parametrize("name", SHARES)
def test_the_recipe_by_layer_spends_zeros_in_vain(name, coupled):
    """Half of each layer's filters, chosen layer by layer, are zeros of which the surgery can remove a part alone."""
    net, plan, _ = coupled(name)
    generator = torch.Generator().manual_seed(0)
    regularizer = TorqueRegularizer(
        net, groups=discover(net, exclude=["fc"] if hasattr(net, "fc") else ["head"])
    )
    for group in regularizer.groups:
        count = group.count(net)
        regularizer.kill(group.name, torch.randperm(count, generator=generator)[: count // 2].tolist())
    assert removable_share(net, blueprint=plan) == pytest.approx(SHARES[name], abs=5e-4)


def test_outputs_and_normalised_widths_are_not_offered(coupled):
    """The classifier's outputs stay, and a width that runs through LayerNorm does."""
    net, _, groups = coupled("vit-packed")
    parts = {(part.parameter, part.axis) for group in groups for part in group.parts}
    assert ("patch.weight", 0) not in parts
    assert not {name for name, _ in parts if name.startswith(("head", "fc", "norm"))}
    assert ("blocks.0.attn.qkv.weight", 0) in parts
    assert ("blocks.0.attn.qkv.weight", 1) not in parts
    assert net.training is False


def test_a_residual_stream_is_one_module(coupled):
    """Everything that writes, normalises or reads a channel of the first stage belongs to it."""
    _net, _, groups = coupled("resnet")
    stream = next(group for group in groups if group.name == "stem")
    assert {(part.parameter, part.axis) for part in stream.parts} == {
        *(
            (f"{norm}.{what}", 0)
            for norm in ("bn", "stages.0.0.bn2", "stages.0.1.bn2")
            for what in ("weight", "bias")
        ),
        *((f"{conv}.weight", 0) for conv in ("stem", "stages.0.0.conv2", "stages.0.1.conv2")),
        *((f"stages.0.{block}.conv1.weight", 1) for block in (0, 1)),
        *((f"stages.1.0.{conv}.weight", 1) for conv in ("conv1", "down.0")),
    }
    assert not any(part.index for part in stream.parts)


def test_what_decides_alone_is_proven(coupled):
    """All writers, all readers or all gains of a stream make a channel dead; one writer of three does not."""
    net, _, groups = coupled("resnet")
    regularizer = TorqueRegularizer(net, groups=groups)
    stream = next(group for group in groups if group.name == "stem")
    roles = [{stream.parts[place].parameter for place in chosen} for chosen in stream.deciding]
    assert {"stem.weight", "stages.0.0.conv2.weight", "stages.0.1.conv2.weight"} in roles
    assert {"bn.weight", "stages.0.0.bn2.weight", "stages.0.1.bn2.weight"} in roles
    assert len(roles) == 3
    with torch.no_grad():
        net.stem.weight[0] = 0
        net.stages[0][0].conv2.weight[:2] = 0
        net.stages[0][1].conv2.weight[:2] = 0
        for norm in (net.bn, net.stages[0][0].bn2, net.stages[0][1].bn2):
            norm.weight[5] = 0
    assert torch.nonzero(regularizer.dead()["stem"]).reshape(-1).tolist() == [0, 5]


def test_gains_are_part_of_the_module(coupled):
    """Slimming finds the gains in the surgery's groups, and a gain of zero is a dead channel.

    The gain in front of a padded depthwise convolution is not enough: what is constant there is not behind its border.
    """
    net, plan, groups = coupled("mobilenetv2")
    regularizer = SlimmingRegularizer(net, groups=groups)
    assert len(regularizer.groups) == len(groups)
    with torch.no_grad():
        net.blocks[1].expand[1].weight[3] = 0
        net.blocks[1].depth[1].weight[7] = 0
    name = next(g.name for g in groups if "blocks.1.expand" in g.name)
    assert torch.nonzero(regularizer.dead()[name]).reshape(-1).tolist() == [7]
    regularizer.freeze()
    assert plan.price(plan.zeros_of(net)).parameters == plan.total - int(plan.zeros_of(net).sum()) + 1


class Shared(nn.Module):
    """Two layers of one weight, of which only one's outputs could go."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        """Scores of x."""
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def test_shared_weights_are_pruned_only_where_all_their_uses_agree():
    """A weight whose rows are two widths is no part of either."""
    net = Shared()
    groups = coupled_groups(net, torch.randn(2, 6))
    assert "first.weight" not in {part.parameter for group in groups for part in group.parts}
    regularizer = TorqueRegularizer(net, groups=groups)
    for group in groups:
        regularizer.kill(group.name, [0, 1])
    assert removable_share(net, torch.randn(2, 6)) == 1.0
    with torch.no_grad():
        net.first.weight[0] = 0
    plan = Blueprint(net, torch.randn(2, 6))
    # both uses lose their row 0, the second also its column 0, which the first keeps
    assert plan.total - plan.price(plan.zeros_of(net)).parameters == 6 + 2 * 2


def test_both_exporters_give_the_same_groups():
    """BatchNorm, which one of them would compute into the convolution, is found again."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)),
    )
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one, other = (coupled_groups(net, torch.randn(2, 3, 8, 8), exporter=e) for e in ("torchscript", "dynamo"))
    assert [(g.name, g.kind, sorted(map(str, g.parts))) for g in one] == [
        (g.name, g.kind, sorted(map(str, g.parts))) for g in other
    ]
    assert [(g.name, len(g.parts), len(g.deciding)) for g in one] == [("0", 4, 3), ("3", 5, 3)]
    assert one[1].parts[-1].index == tuple(place // 36 for place in range(144))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_prices_are_those_of_the_smaller_network():
    """Parameters and multiply-accumulates of a network with dead filters are the reduced one's, by hand."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5)
    )
    plan = Blueprint(net, torch.randn(1, 3, 4, 4))
    zero = np.zeros(plan.total, bool)
    assert plan.price(zero) == Price(3 * 9 * 8 + 8 + 32 + 4 + 64 * 5 + 5, 16 * (27 * 8 + 32) + 320)
    regularizer = TorqueRegularizer(net, groups=coupled_groups(net, None, blueprint=plan))
    regularizer.kill("0", [1, 2, 5])
    regularizer.kill("2", [3])
    assert plan.price(plan.zeros_of(net)) == Price(27 * 5 + 5 + 15 + 3 + 48 * 5 + 5, 16 * (27 * 5 + 15) + 240)


def test_a_network_without_zeros_has_no_share():
    """There is nothing to divide by."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UsageError):
        removable_share(net, torch.randn(2, 3))
    with pytest.raises(UsageError):
        Blueprint(net, torch.randn(2, 3), exporter="tracing")
    with pytest.raises(ExportError):
        Blueprint(net, torch.randn(2, 7))
