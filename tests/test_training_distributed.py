"""Two processes prune what one does: data parallel, sharded, resumed."""

import numpy as np
import onnx
import pytest
import torch
import two_processes
from torchrun import in_two_processes

from etp_deploy.training.recording import read_rows


@pytest.fixture(scope="module")
def alone():
    """What one process finds, by case."""
    planned = two_processes.plan()
    return {
        case: two_processes.run(case, two_processes.network(), planned).found()
        for case in two_processes.CASES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes left what they found."""
    return in_two_processes(two_processes.__file__, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def both(folder):
    """What each of two processes found."""
    return [torch.load(folder / f"answers-{rank}.pt", weights_only=False) for rank in range(2)]


def same_dead(one, other):
    """Whether the same modules are dead."""
    return all(torch.equal(one["dead"][name], other["dead"][name]) for name in one["dead"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", ["target", "landing"])
def test_two_processes_reach_the_target_with_the_same_dead_set(how, case, alone, both):
    """Shrinking, freezing, pricing and killing end in the same modules, and both processes agree to the bit."""
    wanted = alone[case]
    assert wanted["history"][-1][3]
    if case == "target":  # by force alone, in every group
        assert all(gone.any() for gone in wanted["dead"].values())
    else:  # by score
        assert any(killed for _, _, killed, _ in wanted["history"])
    for rank in range(2):
        found = both[rank][how, case]
        assert same_dead(found, wanted)
        assert found["history"] == wanted["history"]
        for name, weight in wanted["weights"].items():
            assert torch.equal(found["weights"][name], both[0][how, case]["weights"][name])
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "case"),
    [
        *(
            (how, case)
            for how in ("ddp", "fsdp")
            for case in ("gradients", "gradients_l2", "gradients_mean_l1", "mean_l1")
        ),
        *((how, case) for how in ("ddp", "ddp, gradients in buckets") for case in ("inside", "inside_l2")),
    ],
)
def test_every_way_to_apply_the_force_gives_the_same_weights(how, case, alone, both):
    """The force added to gradients, in the loss, and steps of another norm: the weights and metrics of one process."""
    for rank in range(2):
        found = both[rank][how, case]
        assert same_dead(found, alone[case])
        for name, weight in alone[case]["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6)
        for name, scores in alone[case]["scores"].items():
            torch.testing.assert_close(found["scores"][name], scores, rtol=1e-4, atol=1e-6)
        assert found["metrics"] == pytest.approx(alone[case]["metrics"], rel=1e-4)


def test_the_force_matters_in_these_cases(alone):
    """Without force the weights are others, so that the comparison means something."""
    planned = two_processes.plan()
    free = two_processes.Training(two_processes.network(), planned[1], beta=0.0).epochs(0, 1).found()
    for case in ("gradients", "gradients_l2", "mean_l1", "inside", "inside_l2"):
        off = [
            (alone[case]["weights"][name] - weight).abs().max() for name, weight in free["weights"].items()
        ]
        assert max(off) > 1e-3


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_resumed_training_of_two_processes_has_the_same_bits(how, both):
    """Cut in two by a checkpoint that is read with `weights_only`, in new objects."""
    for rank in range(2):
        straight, resumed = both[rank][how, "target"], both[rank][how, "resumed"]
        assert resumed["history"] == straight["history"]
        for name, weight in straight["weights"].items():
            assert torch.equal(resumed["weights"][name], weight)


def test_a_regulariser_may_be_older_than_the_shards(both):
    """What it knew of the whole network holds for its shards, the frozen included."""
    for answers in both:
        before, after = answers["made before"]
        assert [int(place) for place in (after["2"] == 0).nonzero()] == [0, 17]
        for name, scores in before.items():
            torch.testing.assert_close(after[name], scores)


def test_two_processes_find_the_order_of_one(both):
    """Each asks half of the examples; sensitivity and order are those of all, and training goes on from there."""
    planned = two_processes.plan()
    wanted = two_processes.importance(two_processes.network(), planned)
    for answers in both:
        found = answers["importance"]
        for name, own in wanted["sensitivity"].items():
            torch.testing.assert_close(found["sensitivity"][name], own, rtol=1e-4, atol=1e-12)
            assert torch.equal(found["sensitivity"][name], both[0]["importance"]["sensitivity"][name])
            assert torch.equal(found["order"][name], wanted["order"][name])
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-5)


def test_the_first_process_decides(both):
    """Measured costs differ between processes; what the first says, and raises, holds on both."""
    assert [answers["disagreement"] for answers in both] == [(False, "rank 0")] * 2


def test_the_log_is_written_once(folder, both):
    """Two updates of three groups are six rows, not twelve."""
    assert len(read_rows(folder / "log.jsonl")) == 2 * len(both[0]["fsdp", "target"]["dead"])


def test_what_shards_do_not_allow_is_refused(both):
    """The penalty, an export, and flattened parameters, each in one line with what to do instead."""
    for answers in both:
        said = answers["refusals"]
        assert "add_gradients" in said["penalty"]
        assert "before fully_shard" in said["sensitivity"]
        assert "before fully_shard" in said["blueprint"]
        assert "fully_shard" in said["flat"]
        assert "fully_shard" in said["flattened"]


def test_the_sample_for_several_processes_prunes_to_its_target(folder, both):
    """Sharded over two processes, exported by the first: half of the parameters at most, and something left."""
    assert [answers["sample"] for answers in both] == [0, 0]
    full, small = (
        sum(int(np.prod(tensor.dims)) for tensor in onnx.load(folder / name).graph.initializer)
        for name in ("full.onnx", "small.onnx")
    )
    assert 0.3 * full < small <= 0.5 * full
