"""The benchmark of ETP runs a cell from training to the measured file, resumes, and meets its speed-up."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "etp"))

import methods
import models
import report
import run
from data import Data, Split
from pruning import choose, compacted, expanded, macs
from tasks import CLASSES, TASKS, Recipe, Task

from etp_deploy.training import coupled_groups

METHODS = dict(methods.METHODS)


def images(count, seed):
    """Images whose class is the quarter that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pictures = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        picture[:, row : row + 4, column : column + 4] += 1
    return Split((pictures,), labels)


TINY = Task(
    "tiny",
    "tiny",
    CLASSES,
    lambda: Data(images(160, 0), images(80, 1), images(80, 2)),
    lambda _: models.Vgg(16, (2, 1), classes=4),
    Recipe(rate=1e-2, batch=32, dense=3, force=2, tune=2),
    seeds=1,
    reduced="synthetic",
    speedups=(4.0,),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One task with two methods, run to its end without timing."""
    folder = tmp_path_factory.mktemp("etp")
    results = run.Results(folder / "tiny.jsonl")
    # too weak to bring anything to zero, so that what goes is what the ranking takes
    weak = replace(
        methods.METHODS["etp"], choices=(methods.Choice(0.1, "norm"), methods.Choice(0.1, "sensitivity"))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "etp", weak)
        run.Experiment(TINY, results, folder / "runs", bench_seconds=0).run(["etp"], 0)
        yield folder


def test_a_cell_end_to_end(finished):
    """Dense and pruned cells hold everything; speed-up met, answers equal, the file as small as the network."""
    cells = {r["method"]: r for r in run.Results(finished / "tiny.jsonl").records if r["record"] == "cell"}
    assert set(cells) == {"dense", "etp"}
    found = cells["etp"]
    assert found["value"] > 0.8
    assert 4 <= found["macs"]["ratio"] < 6
    # exactly what the units say has been removed: not one multiplication more is left in the file
    assert found["onnx"]["macs"]["compressed"] == found["macs"]["pruned"]
    assert found["onnx"]["macs"]["exported"] == found["macs"]["dense"] == cells["dense"]["macs"]["pruned"]
    assert found["equality"]["equal"] == found["equality"]["examples"] == 80
    assert (found["strength"], found["variant"]) in {(0.1, "norm"), (0.1, "sensitivity")}


def test_what_is_finished_is_not_run_again(finished, monkeypatch):
    """A second run trains nothing and writes nothing; with a record taken away just that one is made again."""
    path = finished / "tiny.jsonl"
    before = path.read_text()
    trained = []
    monkeypatch.setattr(run.training, "train", lambda *_args, **_keywords: trained.append(1))
    run.Experiment(TINY, run.Results(path), finished / "empty", bench_seconds=0).run(["etp"], 0)
    assert path.read_text() == before
    assert not trained
    path.write_text("".join(line + "\n" for line in before.splitlines()[:-1]))
    run.Experiment(TINY, run.Results(path), finished / "runs", bench_seconds=0).run(["etp"], 0)
    first, again = json.loads(before.splitlines()[-1]), json.loads(path.read_text().splitlines()[-1])
    assert (again["value"], again["macs"]) == (first["value"], first["macs"])
    assert not trained


def test_the_report_says_what_was_found(finished):
    """The table has the rows; with no rival finished nothing is claimed."""
    found = report.summary(TINY, run.Results(finished / "tiny.jsonl").records)
    assert [(row["method"], row["speedup"]) for row in found["rows"]] == [("dense", 1.0), ("etp", 4.0)]
    assert found["verdicts"] == [{"speedup": 4.0, "outcome": "unfinished"}]
    text = report.markdown([found], {})
    assert "80 of 80" in text


@pytest.mark.parametrize("name", ["etp", "etp-index"])
@pytest.mark.parametrize(
    ("ours", "theirs", "outcome", "clear"),
    [
        ([0.9, 0.91, 0.92], [0.8, 0.81, 0.82], "ahead", True),
        # each seed's networks have one start: what seeds have in common is no doubt
        ([0.80, 0.86, 0.92], [0.791, 0.85, 0.909], "ahead", True),
        ([0.80, 0.86, 0.92], [0.91, 0.85, 0.79], "ahead", False),
        ([0.8, 0.81, 0.82], [0.9, 0.91, 0.92], "behind", True),
    ],
)
def test_verdicts(name, ours, theirs, outcome, clear):
    """Ahead and behind are told apart, and from what lies within the spread of the seeds."""
    rows = [
        {
            "method": method,
            "speedup": 4.0,
            "seeds": 3,
            "mean": sum(values) / 3,
            "values": dict(enumerate(values)),
        }
        for method, values in ((name, ours), ("lasso", theirs))
    ]
    found = report._verdict(TINY, rows, 4.0, name)
    assert (found["outcome"], found["clear"], found["best_other"]) == (outcome, clear, "lasso")


def test_against_the_literature_the_ordered_linear_torque_does_not_count():
    """It is best of all, and no method as published; the overview adds up all answers, and ETP's alone."""
    cells = [
        {
            "record": "cell",
            "method": method,
            "speedup": speedup,
            "seed": seed,
            "value": value + seed / 100,
            "strength": 1.0,
            "variant": "",
            "seconds": 1.0,
            "macs": {"dense": 8, "ratio": 4.0},
            "onnx": {"macs": {"compressed": 2}},
            "parameters": {"dense": 8, "pruned": 2},
            "equality": {"equal": equal, "examples": 10, "largest_error": 0.0},
        }
        for method, speedup, value, equal in (
            ("dense", 1.0, 0.9, 10),
            ("etp", 4.0, 0.8, 9),
            ("linear", 4.0, 0.82, 10),
            ("linear-index", 4.0, 0.7, 10),
        )
        for seed in (1, 0)
    ]
    found = report.summary(TINY, cells)
    outcomes = {
        name: (found[name][0]["outcome"], found[name][0]["best_other"]) for name in ("verdicts", "literature")
    }
    assert outcomes == {"verdicts": ("behind", "linear"), "literature": ("ahead", "linear-index")}
    assert list(found["rows"][1]["values"]) == [0, 1]
    assert "78 of 80 are PyTorch's; of ETP's, 18 of 20." in report.markdown([found], {})


def test_doubt_is_students_interval_of_paired_differences():
    """By hand: differences 1, 2, 3 have the deviation 1; t at 2 degrees is 4.303. Other seeds do not count."""
    ours = {"values": {2: 6.0, 0: 2.0, 1: 4.0, 7: 99.0}}
    best = {"values": {0: 1.0, 1: 2.0, 2: 3.0, 8: -99.0}}
    assert report._doubt(ours, best) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert report._doubt(ours, {"values": {0: 1.0}}) is None


@pytest.mark.parametrize(("ours", "clear"), [(0.84, False), (0.9, True)])
def test_one_seed_is_held_against_the_size_of_the_test_sample(ours, clear):
    """With one seed a lead counts only where that many test examples can tell it."""
    rows = [
        {"method": name, "speedup": 4.0, "seeds": 1, "mean": mean, "values": {0: mean}, "examples": 1000}
        for name, mean in (("etp", ours), ("lasso", 0.82))
    ]
    found = report._verdict(TINY, rows, 4.0)
    assert (found["outcome"], found["clear"]) == ("ahead", clear)
    wanted = 2 * ((ours * (1 - ours) + 0.82 * 0.18) / 1000) ** 0.5
    assert found["doubt"] == pytest.approx(wanted)


def small_network(name):
    """One of the networks at its smallest, and inputs."""
    torch.manual_seed(0)
    network, inputs = {
        "vgg": lambda: (models.Vgg(8, (1, 1)), (torch.randn(2, 1, 8, 8),)),
        "resnet": lambda: (models.ResNet(4, (2, 1)), (torch.randn(2, 1, 8, 8),)),
        "vit": lambda: (models.Vit(width=16, depth=1, hidden=32, side=16), (torch.randn(2, 1, 16, 16),)),
        "gat": lambda: (
            models.Gat(6, 4, 4, 3),
            (torch.randn(2, 5, 6), (torch.rand(2, 5, 5) > 0.5) + torch.eye(5)),
        ),
        "informer": lambda: (
            models.Informer(width=16, hidden=32),
            (torch.randn(2, 48, 5), torch.randn(2, 72, 3)),
        ),
    }[name]()
    return network.eval(), inputs


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "gat", "informer"])
def test_units_are_all_that_has_to_go(name):
    """Without some of each unit's modules a network computes what it computes with them at zero."""
    network, inputs = small_network(name)
    units = network.units()
    scores = {unit.group.name: torch.rand(unit.count(network)) for unit in units}
    keep = choose(network, units, scores, inputs, 1.5)
    small = compacted(network, units, keep)
    full = expanded(small, network, units, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), full(*inputs), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(full(*inputs), network(*inputs), rtol=1e-4, atol=1e-5)
    assert macs(network, inputs) >= 1.5 * macs(small, inputs)
    with pytest.raises(ValueError, match="out of reach"):
        choose(network, units, scores, inputs, 1e6)


def modules_of(part, network):
    """The module that each index of a part's axis belongs to."""
    if part.index is not None:
        return tuple(part.index)
    split = part.split or (network.get_parameter(part.parameter).shape[part.axis],)
    shape = [-1 if place == part.position else 1 for place in range(len(split))]
    return tuple(torch.arange(split[part.position]).view(shape).expand(split).flatten().tolist())


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "gat"])
def test_units_are_the_groups_of_the_surgery(name):
    """What the networks declare is what the surgery's coupling finds: the same weights in the same modules."""
    network, inputs = small_network(name)
    parameters = dict(network.named_parameters())
    declared = {
        frozenset(
            (part.parameter, part.axis, modules_of(part, network))
            for part in (*unit.group.parts, *unit.slices)
            if part.parameter in parameters
        )
        for unit in network.units()
    }
    coupled = {
        frozenset((part.parameter, part.axis, modules_of(part, network)) for part in group.parts)
        for group in coupled_groups(network, inputs)
    }
    assert declared == coupled


def test_the_order_makes_the_table_useful_early():
    """All tasks get their first methods with seed 0 before any gets another seed."""
    order = [(task.name, seed) for task, _, seed in run.rounds(list(TASKS.values()), list(methods.METHODS))]
    assert order[: len(TASKS)] == [(name, 0) for name in TASKS]
    assert ("vision-vgg", 2) in order
    assert {seed for _, _, seed in run.rounds([TINY], list(methods.METHODS))} == {0}


def test_all_methods_have_as_much_to_choose_from():
    """None is tuned more than the others; both torques from the very same."""
    counts = {name: len(set(method.choices)) for name, method in METHODS.items()}
    assert counts.pop("cut") == 2
    assert set(counts.values()) == {6}
    assert METHODS["etp"].choices == METHODS["linear"].choices


def ones(speedup, choice, name):
    """A method at work on a network whose modules are all of their unit's average size, and that network."""
    torch.manual_seed(0)
    network = models.Vgg(16, (1, 1))
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    units = network.units()
    counts = [unit.count(network) for unit in units]
    places = torch.randperm(sum(counts)).double().split(counts)
    order = {unit.group.name: row for unit, row in zip(units, places, strict=True)}
    example = (torch.randn(1, 1, 8, 8),)
    setting = methods.Setting(network, units, example, choice, 0.5, speedup, lambda: order)
    return METHODS[name].force(setting), network, order


@pytest.mark.parametrize(
    ("name", "variant"), [("etp", "norm"), ("linear", "norm"), ("etp-index", ""), ("lasso", "")]
)
@pytest.mark.parametrize("speedup", [4.0, 9.0])
def test_strength_one_is_what_the_first_module_that_has_to_go_needs(name, variant, speedup):
    """Without gradients, the module at the edge of the kept share is zero after all pulls, and no nearer one is."""
    force, network, _ = ones(speedup, methods.Choice(1.0, variant), name)
    for _ in range(100):
        force.pull(0.5 / 100 * 1.001)
    for unit in network.units():
        dead = force.regularizers[unit.group.name].scores()[unit.group.name] == 0
        count = len(dead)
        staying = max(unit.least(network), round(force.share * count))
        wanted = count if name == "lasso" else count - staying
        assert int(dead.sum()) == wanted


@pytest.mark.parametrize("name", ["etp", "linear"])
@pytest.mark.parametrize("speedup", [4.0, 9.0])
def test_an_order_over_the_network_says_what_goes(name, speedup):
    """With strength 1 the places before the edge are zero after all pulls, whichever the unit, and go."""
    force, network, order = ones(speedup, methods.Choice(1.0, "sensitivity"), name)
    for _ in range(100):
        force.pull(0.5 / 100 * 1.001)
    keep = choose(network, network.units(), order, force.setting.example, speedup)
    gone = int((~torch.cat(list(keep.values()))).sum())
    for unit in network.units():
        group = unit.group.name
        dead = force.regularizers[group].scores()[group] == 0
        assert torch.equal(dead, order[group] < gone)
    _, kept = force.pruned()
    assert all(torch.equal(kept[group], keep[group]) for group in keep)


@pytest.mark.parametrize("variant", ["norm squared", "sensitivity squared"])
def test_a_squared_pull_of_one_leaves_its_share(variant):
    """Of the module at the edge exp(-2) is left, and less of those beyond."""
    force, network, order = ones(4.0, methods.Choice(1.0, variant), "etp")
    before = {name: one.scores()[name] for name, one in force.regularizers.items()}
    for _ in range(2000):
        force.pull(0.5 / 2000)
    for name, regularizer in force.regularizers.items():
        left = regularizer.scores()[name] / before[name]
        pulls = regularizer.forces(name) / force.edges[name]
        assert torch.allclose(left.double(), torch.exp(-2 * pulls), rtol=0.02, atol=1e-6)
        assert bool((pulls > 1).any())
    if variant == "sensitivity squared":
        whole = {name: order[name].argsort().tolist() for name in order}
        assert all(
            force.regularizers[name].scores()[name].argsort().tolist() == whole[name] for name in whole
        )
    del network


@pytest.mark.parametrize("variant", ["norm", "sensitivity"])
def test_cut_at_the_start(variant):
    """What goes is read by nobody from the first step on, and the speed-up is met."""
    force, network, _ = ones(4.0, methods.Choice(0.0, variant), "cut")
    whole = macs(network, force.setting.example)
    force.pull(1.0)
    for unit in network.units():
        for part in unit.readers().parts:
            rows = network.get_parameter(part.parameter).movedim(part.axis, 0).flatten(1)
            assert torch.equal((rows == 0).all(1), ~force.keep[unit.group.name])
    small, _ = force.pruned()
    assert macs(small, force.setting.example) <= whole / 4
