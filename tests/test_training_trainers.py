"""Lightning's and Hugging Face's own data parallel training: two processes prune what one does."""

import pytest
import test_training_integrations as alone
import torch
import two_processes
import two_trainers
from torchrun import in_two_processes


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each of two processes found."""
    place = in_two_processes(two_trainers.__file__, tmp_path_factory.mktemp("trainers"))
    return [torch.load(place / f"answers-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def expected():
    """What a loop by hand in one process ends in."""
    return alone.by_hand(two_processes.plan(), alone.samples(), autocast=False, proximal=True)


@pytest.mark.parametrize("which", ["lightning", "hugging face"])
def test_two_processes_end_with_the_dead_set_of_one(which, answers, expected):
    """The target is reached by force; both processes agree to the bit, and with one to rounding."""
    model, force = expected
    wanted = force.regularizer.dead()
    assert force.done
    assert sum(int(gone.sum()) for gone in wanted.values()) == force.history[-1].dead > 0
    for rank in range(2):
        found = answers[rank][which]
        assert all(torch.equal(found["dead"][name], gone) for name, gone in wanted.items())
        assert [(one.dead, one.ratio, one.done) for one in found["history"]] == [
            (one.dead, one.ratio, one.done) for one in force.history
        ]
        for name, weight in model.named_parameters():
            assert torch.equal(found["weights"][name], answers[0][which]["weights"][name])
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-5)
