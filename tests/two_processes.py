"""A small training that runs in one process or in several, and what several processes are asked to do."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torchrun import leave_group

from etp_deploy.errors import EtpError, UsageError
from etp_deploy.training import (
    Blueprint,
    Controller,
    Cost,
    PlannedCost,
    Recorder,
    Scheduled,
    coupled_groups,
    make,
    removal_order,
    sensitivity,
)
from etp_deploy.training.shards import from_first, whole
from etp_deploy.training.wrapping import named_parameters

INPUT = torch.zeros(1, 1, 6, 6)
RATE = 0.05


def network():
    """Return a network without BatchNorm, whose statistics would be each process's own; 13 does not halve."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 13, 3, padding=1), nn.ReLU(), nn.Conv2d(13, 18, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 1)),
    )


def plan():
    """Return the network's blueprint and groups."""
    blueprint = Blueprint(network(), INPUT)
    return blueprint, coupled_groups(network(), None, blueprint=blueprint)


class Training:
    """Telling bright noise from dark, in as many processes as there are.

    Args:
        model: the network, wrapped or not.
        groups: the plain network's.
        blueprint: where a target of 40 % of the parameters is to be reached; else the force has no end.
        method: see `make`.
        beta: strength.
        proximal: see `Scheduled`.
        inside: whether the loss holds the penalty.
        recorder: see `Scheduled`.
    """

    def __init__(
        self,
        model,
        groups,
        *,
        blueprint=None,
        method="group_lasso",
        beta=0.02,
        proximal=True,
        inside=False,
        recorder=None,
    ):
        self.model = model
        self.inside = inside
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        regularizer = make(method, model, groups, beta)
        options = {"proximal": proximal, "recorder": recorder}
        self.force = (
            Scheduled(regularizer, **options)
            if blueprint is None
            else Controller(regularizer, "params:0.4", updates=4, blueprint=blueprint, **options)
        )

    def epochs(self, first, last):
        """Train, each process on its share of every batch."""
        parallel = distributed.is_initialized()
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if parallel else (0, 1)
        for epoch in range(first, last):
            generator = torch.Generator().manual_seed(epoch)
            for _ in range(4):
                wanted = torch.arange(16) % 2 * 2.0 - 1
                images = torch.randn(16, 1, 6, 6, generator=generator) + 3 * wanted.reshape(-1, 1, 1, 1)
                own = slice(rank * 16 // world, (rank + 1) * 16 // world)
                self.optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.model(images[own])[:, 0], wanted[own])
                (loss + self.force.penalty() if self.inside else loss).backward()
                if not (self.force.proximal or self.inside):
                    self.force.add_gradients()
                self.optimizer.step()
                self.force.step(RATE)
            with torch.no_grad():  # after this the root of a sharded network holds copies
                self.model(INPUT)
            self.force.update()
        return self

    def found(self):
        """Return what several processes and one have to agree about."""
        regularizer = self.force.regularizer
        return {
            "dead": regularizer.dead(),
            "scores": regularizer.scores(),
            "weights": {
                name: whole(weight).detach().clone() for name, weight in named_parameters(self.model)
            },
            "history": [(found.dead, found.ratio, found.killed, found.done) for found in self.force.history],
            "metrics": self.force.metrics(),
        }

    def state(self):
        """Return a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "force": self.force.state_dict(),
        }

    def load(self, state):
        """Go on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.force.load_state_dict(state["force"])
        return self


#: The trainings that are compared: what `Training` is told, and how many epochs.
CASES = {
    "target": ({"target": True, "beta": 0.05}, 5),
    "landing": ({"target": True, "beta": 0.02}, 4),
    "gradients": ({"method": "etp", "beta": 1e-3, "proximal": False}, 1),
    "gradients_l2": ({"method": "group_lasso", "beta": 2e-3, "proximal": False}, 1),
    "gradients_mean_l1": ({"method": "etp_reference", "beta": 1e-2, "proximal": False}, 1),
    "mean_l1": ({"method": "etp_reference", "beta": 1e-2}, 1),
    "inside": ({"method": "etp", "beta": 1e-3, "proximal": False, "inside": True}, 1),
    "inside_l2": ({"method": "group_lasso", "beta": 2e-3, "proximal": False, "inside": True}, 1),
}


def run(case, model, planned):
    """Train one of the cases."""
    options, epochs = CASES[case]
    options = dict(options)
    blueprint, groups = planned
    if options.pop("target", False):
        options["blueprint"] = blueprint
    return Training(model, groups, **options).epochs(0, epochs)


def sharded():
    """Return the network with `fully_shard` on each convolution and on the whole, whose own are the linear layers.

    What is the whole's own stays unsharded after a forward without gradients.
    """
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - a second that one process does not need

    model = network()
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer)
    fully_shard(model)
    return model


def replicated(**options):
    """Return the network as `DistributedDataParallel` trains it."""
    return nn.parallel.DistributedDataParallel(network(), **options)


def resumed(wrap, planned, folder):
    """Return what a training gives that was cut in two by a checkpoint, on the file system and read safely."""
    blueprint, groups = planned
    path = Path(folder, f"checkpoint-{distributed.get_rank()}.pt")
    options = {"blueprint": blueprint, "beta": 0.05}
    torch.save(Training(wrap(), groups, **options).epochs(0, 3).state(), path)
    second = Training(wrap(), groups, **options)
    return second.load(torch.load(path, weights_only=True)).epochs(3, 5).found()


def made_before(groups):
    """Return the scores that a regulariser gives whose network was sharded later, dead modules among them."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - as above

    model = network()
    regularizer = make("group_lasso", model, groups)
    regularizer.kill("2", [0, 17])
    regularizer.freeze()
    whole_scores = regularizer.scores()
    fully_shard(model, ignored_params=set(model[8].parameters()))  # these stay whole on both, and count once
    with torch.no_grad():
        regularizer.hold()
    return whole_scores, regularizer.scores()


def message(call):
    """Return what an error says, nothing where there is none."""
    try:
        call()
    except EtpError as error:
        return str(error)
    return ""


class OwnOpinion(Cost):
    """A cost that each process measures otherwise, as latencies are."""

    asked = 0

    def ratio(self, model, zero):
        """Return 0.9 on the first process once it has been said that the target can be reached, less elsewhere."""
        del model, zero
        self.asked += 1
        return 0.9 if distributed.get_rank() == 0 and self.asked > 1 else 0.1


def disagreement(groups):
    """Return whether a controller is done after an update, and what each process raises of the first's error."""

    def refuse():
        raise UsageError(f"rank {distributed.get_rank()}")

    controller = Controller(make("l1", network(), groups), "latency:0.5", updates=4, cost=OwnOpinion())
    controller.step(RATE)
    return controller.update().done, message(lambda: from_first(refuse))


def refusals(planned):
    """Return what is said of a sharded network's penalty and export, and of FullyShardedDataParallel."""
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 - as above

    model = sharded()
    regularizer = make("etp", model, planned[1])
    flat, inner = FullyShardedDataParallel(network(), device_id=torch.device("cpu")), network()
    early = make("etp", inner, planned[1])
    FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    return {
        "penalty": message(regularizer.penalty),
        "blueprint": message(lambda: Blueprint(model, INPUT)),
        "sensitivity": message(lambda: sensitivity(model, planned[1], [], nn.Module.forward)),
        "flat": message(lambda: make("etp", flat, planned[1])),
        "flattened": message(lambda: early.shrink(0.1)),
    }


def importance(model, planned):
    """Return sensitivity and order of removal, each process asking its share, and weights trained after that."""
    blueprint, groups = planned
    parallel = distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if parallel else (0, 1)
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(4, 1, 6, 6, generator=generator) for _ in range(6)]
    batches = [(x, x.mean((1, 2, 3)).sign()) for x in images][rank::world]

    def loss(network, batch):
        return nn.functional.mse_loss(network(batch[0])[:, 0], batch[1])

    cost = PlannedCost(blueprint, "params")
    found = {
        "sensitivity": sensitivity(model, groups, batches, loss),
        "order": removal_order(model, groups, batches, loss, cost=cost, target=0.4, rounds=3),
    }
    trained = Training(model, groups).epochs(0, 1).found()
    return {**found, "weights": trained["weights"]}


def sample(folder):
    """Return what the sample for several processes exits with; its files go to the folder."""
    path = Path(__file__).parents[1] / "samples" / "prune_distributed.py"
    spec = importlib.util.spec_from_file_location("prune_distributed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = ["--epochs=2", "--width=4", "--target=params:0.5", "--sharded"]
    return module.main([*small, f"--output={folder}"])


def main(folder):
    """Do all of it as one of several processes, and leave what was found in a file."""
    torch.set_num_threads(1)
    answers = {"sample": sample(folder)}
    # the sample has used up what torchrun lets processes meet at
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = Path(folder, "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    planned = plan()
    log = Path(folder, "log.jsonl")
    for case in CASES:
        answers["ddp", case] = run(case, replicated(), planned).found()
        if case.startswith("inside"):  # shards have no penalty
            answers["ddp, gradients in buckets", case] = run(
                case, replicated(gradient_as_bucket_view=True), planned
            ).found()
        else:
            answers["fsdp", case] = run(case, sharded(), planned).found()
    for how, wrap in (("ddp", replicated), ("fsdp", sharded)):
        answers[how, "resumed"] = resumed(wrap, planned, folder)
    answers["made before"] = made_before(planned[1])
    Training(sharded(), planned[1], recorder=Recorder(log)).epochs(0, 2)
    answers["importance"] = importance(replicated(), planned)
    answers["disagreement"] = disagreement(planned[1])
    answers["refusals"] = refusals(planned)
    torch.save(answers, Path(folder, f"answers-{distributed.get_rank()}.pt"))
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1])
