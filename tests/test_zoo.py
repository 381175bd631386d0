"""Whole networks with planted dead structure come out equal, at exactly the natively reduced size."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from zoo.export import export, weight_elements  # noqa: E402  # after the check for torch
from zoo.networks import ZOO  # noqa: E402
from zoo.planting import Planted, Planting, plant  # noqa: E402

from etp_deploy.pipeline import compress  # noqa: E402

# what the outputs may differ by, relative to the largest output
TOLERANCE = 1e-5

PLANTINGS = [
    Planting("tail", "weights"),
    Planting("tail", "all"),
    Planting("tail", side="reader"),
    Planting("scattered", "weights"),
    Planting("scattered", "all"),
    Planting("scattered", side="reader"),
    Planting("scattered", side="mixed"),
    Planting("scattered", kinds=("stream",)),
    Planting("scattered", kinds=("inner", "head", "neuron")),
    Planting("tail", share=0.8),
]
# dynamo takes seconds for an export: by default it sees the plantings that ask for the most
CORE = {
    ("torchscript", "static"): (0, 4, 5, 7, 8),
    ("torchscript", "batch"): (1, 2, 3, 9),
    ("torchscript", "all"): (0, 6),
    ("dynamo", "all"): (3,),
}
OTHERS = {("torchscript", "static"): (3, 4), ("torchscript", "batch"): (2, 6), ("torchscript", "all"): (3,)}
DYNAMO_ONLY = {("dynamo", "all"): (6,), ("dynamo23", "static"): (4,)}


@dataclass(frozen=True)
class Case:
    """One network, one way to export it, one planting."""

    network: str
    exporter: str
    dynamic: str
    planting: Planting

    def __str__(self) -> str:
        """A test's name."""
        return f"{self.network}-{self.exporter}-{self.dynamic}-{self.planting}"


def product() -> list:
    """Every case, with a mark on those that only `--full-zoo` runs."""
    found = []
    for name, network in ZOO.items():
        table = CORE if network.core else OTHERS if "torchscript" in network.exporters else DYNAMO_ONLY
        ways = [
            (e, d) for e in network.exporters for d in ("static", "batch", "all") if d in network.dynamics
        ]
        for exporter, dynamic in ways:
            for number, planting in enumerate(PLANTINGS):
                if planting.kinds and not network.streams:
                    continue
                # "all" means as open as it gets
                openness = "all" if exporter == "dynamo" and dynamic == network.dynamics[-1] else dynamic
                usual = number in table.get((exporter, openness), ())
                case = Case(name, exporter, dynamic, planting)
                found.append(pytest.param(case, id=str(case), marks=() if usual else pytest.mark.full_zoo))
    return found


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small networks are slower on several threads, and machines are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """The weight elements of the natively reduced network; plantings of equal widths share one export."""
    path, sizes = tmp_path_factory.mktemp("native") / "native.onnx", {}

    def count(case: Case, planted: Planted) -> int:
        key = (case.network, case.exporter, case.dynamic, *planted.widths.items())
        if key not in sizes:
            net = ZOO[case.network].build(planted.widths)
            sizes[key] = weight_elements(write(net, case, path))
        return sizes[key]

    return count


def build(case: Case) -> tuple:
    """The planted network of a case, and the widths it needs."""
    entry = ZOO[case.network]
    if entry.needs and importlib.util.find_spec(entry.needs) is None:
        pytest.skip(f"{case.network} needs {entry.needs}")
    net, planting = entry.build(), case.planting
    if not entry.constants:
        planting = replace(planting, zeros="all")
    stay = ("head",) if case.exporter in entry.masked else ()
    return net, plant(net, planting, stay=stay)


def write(net, case: Case, path):
    """Export as the case says."""
    return export(net, ZOO[case.network], path, exporter=case.exporter, dynamic=case.dynamic)


def shrink(case: Case, folder, *, whole: bool = False) -> tuple:
    """Export, compress, compare; the elements before and after, and the widths that are needed.

    Unless `whole`, the surgery runs alone: simplification and verification start processes, seconds each.
    """
    net, planted = build(case)
    before, after = write(net, case, folder / "planted.onnx"), folder / "compressed.onnx"
    compress(before, after, align="off", simplify=whole, verify=whole)
    assert_equal(case, before, after)
    return weight_elements(before), weight_elements(after), planted


def run(path, feeds: dict) -> list:
    """All outputs on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_equal(case: Case, before, after) -> None:
    """Both files compute the same, at several sizes where sizes are free."""
    entry = ZOO[case.network]
    sizes = {"static": [(2, 12)], "batch": [(1, 12), (3, 12)], "all": [(1, 12), (3, 7)]}[case.dynamic]
    for seed, (batch, sequence) in enumerate(sizes):
        feeds = {
            k: v.numpy() for k, v in zip(entry.inputs, entry.draw(batch, sequence, seed + 1), strict=True)
        }
        for one, other in zip(run(before, feeds), run(after, feeds), strict=True):
            assert one.shape == other.shape
            assert np.abs(one - other).max() <= TOLERANCE * np.abs(one).max()


@pytest.mark.parametrize("case", product())
def test_planted_networks_shrink_to_the_native_size(case, native, tmp_path):
    """Outputs are equal and the weights are as many as in the native network, carriers counted."""
    _, after, planted = shrink(case, tmp_path)
    assert after == native(case, planted), planted.carriers


@pytest.mark.parametrize("network", ["resnet", "mobilenetv2", "vit", "bert-eager"])
def test_the_whole_job_keeps_the_native_size(network, native, tmp_path):
    """Simplification and verification after the surgery leave the count as it is, or lower."""
    case = Case(network, "torchscript", "static", Planting())
    _, after, planted = shrink(case, tmp_path, whole=True)
    assert after <= native(case, planted), planted.carriers


@pytest.mark.parametrize("network", ZOO)
def test_nothing_dead_is_left_as_it_is(network, tmp_path):
    """A network in which all is alive comes out equal and no larger."""
    case = Case(network, ZOO[network].quickest, "static", Planting(share=0.0))
    before, after, planted = shrink(case, tmp_path)
    assert planted.widths == ZOO[network].widths
    assert after <= before


WHOLES = [(n, key, "weights") for n, e in ZOO.items() for key in e.wholes]
WHOLES += [(n, e.wholes[0], "all") for n, e in ZOO.items() if e.wholes and e.core]


@pytest.mark.parametrize(("network", "key", "zeros"), WHOLES)
def test_a_dead_layer_is_no_obstacle(network, key, zeros, native, tmp_path):
    """A layer that is dead as a whole leaves equal outputs, and at most one unit of it."""
    case = Case(network, ZOO[network].quickest, "static", Planting(zeros=zeros, whole=key))
    _, after, planted = shrink(case, tmp_path)
    assert after <= native(case, planted)


def test_constants_that_relu_hides_need_no_carrier(native, tmp_path):
    """Dead channels whose constant is negative before a ReLU are zero: nothing has to stand for them."""
    case = Case("vgg", "torchscript", "static", Planting(zeros="silent"))
    _, after, planted = shrink(case, tmp_path)
    assert not planted.carriers
    assert after == native(case, planted)


@pytest.mark.parametrize("network", ZOO)
def test_the_constants_matter(network):
    """Control: zeros in place of the constants change the outputs; units that nobody reads count as zero."""
    outputs, widths = {}, []
    for zeros, side in (("weights", "writer"), ("all", "writer"), ("weights", "reader")):
        net, planted = build(Case(network, "", "static", Planting(zeros=zeros, side=side)))
        with torch.no_grad():
            y = net(*ZOO[network].draw())
        outputs[zeros, side] = y[0] if isinstance(y, tuple) else y
        widths.append(planted.live)
        everywhere = all(site.readers or not site.shifts for site in net.sites())
        constants = any(s.bias is not None or s.norm is not None for site in net.sites() for s in site.shifts)
    assert widths[0] == widths[1] == widths[2]
    weights, zero, unread = outputs.values()
    if everywhere:
        torch.testing.assert_close(unread, zero, rtol=0, atol=1e-5 * zero.abs().max().item())
    if constants and ZOO[network].constants:
        assert (weights - zero).abs().max() > 1e-2 * zero.abs().max()


def test_the_count_of_a_network_is_the_sum_by_hand(native):
    """The expectation is what a reader can add up: VGG at half its width, with its carriers."""
    case = Case("vgg", "torchscript", "static", Planting("tail", share=0.5))
    _, planted = build(case)
    assert planted == Planted(
        {"conv0": 8, "conv1": 8, "conv2": 12, "conv3": 12, "conv4": 16, "fc0": 20},
        {"conv0": 9, "conv1": 9, "conv2": 13, "conv3": 13, "conv4": 16, "fc0": 20},
    )
    weights = 9 * (3 * 9 + 9 * 9 + 9 * 13 + 13 * 13 + 13 * 16) + 16 * 16 * 20 + 20 * 10
    biases = 9 + 9 + 13 + 13 + 16 + 20 + 10
    assert native(case, planted) == weights + biases
