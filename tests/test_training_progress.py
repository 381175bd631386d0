"""The force by a schedule, and what a training shows in the terminal."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from etp_deploy.errors import UsageError
from etp_deploy.training import Progress, Schedule, Scheduled, discover, make, progress


def force(schedule=None, **options):
    """A force on six neurons, two of which are dead."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[1:3] = 0
    regularizer = make("group_lasso", model, discover(model, exclude=["2"]), beta=0.5)
    return Scheduled(regularizer, schedule, **options)


def test_the_force_ends_with_its_schedule():
    """Warm-up without force, full strength, then none, and the dead stay dead."""
    scheduled = force(Schedule(4, warmup=0.5))
    weight = scheduled.regularizer.model[0].weight
    moved, history = [], []
    for number in range(6):
        before = weight.detach().clone()
        with torch.no_grad():
            weight[1] += 1e-3
        scheduled.step(0.1)
        moved.append(bool((weight[3] != before[3]).any()))
        if number % 2:
            history.append(scheduled.update())
    assert moved == [False, False, True, True, False, False]
    assert [found.done for found in history] == [False, True, True]
    assert [found.beta for found in history] == [0.0, 0.5, 0.0]
    assert history[-1].dead == history[-2].dead
    assert not weight[2].any()


def test_a_scheduled_force_resumes():
    """State goes over to a new object, and an option that cannot be meant is refused."""
    first, second = force(Schedule(8)), force(Schedule(8))
    for _ in range(3):
        first.step(0.1)
    first.update()
    second.regularizer.model.load_state_dict(first.regularizer.model.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        first.step(0.1)
        second.step(0.1)
    assert first.update() == second.update()
    assert torch.equal(first.regularizer.model[0].weight, second.regularizer.model[0].weight)
    assert first.metrics() == second.metrics()
    with pytest.raises(UsageError, match="neither update nor step"):
        force(clip="epoch")


def test_the_force_may_act_on_gradients():
    """With `proximal=False` a step moves nothing, the penalty has a value, and both end with the schedule."""
    scheduled = force(Schedule(1), proximal=False)
    weight = scheduled.regularizer.model[0].weight
    weight.grad = torch.zeros_like(weight)
    scheduled.add_gradients(2.0)
    expected = weight.grad.clone()
    scheduled.penalty().backward()
    torch.testing.assert_close(weight.grad, 1.5 * expected)
    assert expected.any()
    before = weight.detach().clone()
    scheduled.step(0.1)
    assert torch.equal(weight, before)
    scheduled.update()
    weight.grad.zero_()
    scheduled.add_gradients()
    assert not weight.grad.any()
    assert float(scheduled.penalty()) == 0.0


def test_metrics_name_every_group():
    """Strength, dead and norms, in a form that any logger takes."""
    scheduled = force()
    scheduled.update()
    found = scheduled.metrics()
    assert found["etp/beta"] == 0.5
    assert found["etp/dead"] == found["etp/0/dead"] == 2.0
    norms = scheduled.regularizer.model[0].weight.detach().norm(dim=1)
    assert found["etp/0/mean_norm"] == pytest.approx(float(norms.mean()))
    assert found["etp/0/max_norm"] == pytest.approx(float(norms.max()))
    assert found["etp/0/max_force"] == pytest.approx(0.5)
    assert all(isinstance(value, float) for value in found.values())


def shown(*, terminal, quiet=False, monkeypatch=None):
    """What two epochs of three batches print."""
    if quiet:
        monkeypatch.setattr(progress, "is_first", lambda: False)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)
    scheduled = force(Schedule(3))
    with Progress(scheduled, 12, start=9, console=console) as bar:
        for _ in range(2):
            for number in bar.batches(range(3)):
                bar.loss(torch.tensor(float(number), requires_grad=True))
                scheduled.step(0.01)
            scheduled.update()
            bar.line()
    return console.file.getvalue()


def test_each_epoch_has_a_line_and_the_end_a_table():
    """Loss, force, dead and the time left; survivors of the group; no bar where it is no terminal."""
    text = shown(terminal=False)
    lines = text.splitlines()
    assert re.fullmatch(r"epoch 10/12  loss 1\.0000  force 5\.00e-01  dead 2/6  \d:\d\d left", lines[0])
    assert re.fullmatch(r"epoch 11/12  loss 1\.0000  force off       dead 2/6  \d:\d\d left", lines[1])
    assert re.search(r"│ 0 +│ neurons │ +4 │ +6 │", text)
    assert "\x1b" not in text


def test_a_terminal_has_a_bar():
    """On a terminal the bar counts the batches of its epoch."""
    assert re.search(r"epoch 10/12 .*━━.*0/3", shown(terminal=True))


def test_other_processes_print_nothing(monkeypatch):
    """One of several processes prints."""
    assert not shown(terminal=True, quiet=True, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3725, "1:02:05")])
def test_the_time_left_reads_as_a_clock(seconds, text):
    """Minutes and seconds, hours where there are any."""
    assert progress._clock(seconds) == text
