"""What one of two processes trains with Lightning's and Hugging Face's own ways to use several."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import test_training_integrations as alone
import torch
import two_processes
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler
from torchrun import leave_group

from etp_deploy.training import huggingface, lightning
from etp_deploy.training.shards import whole
from etp_deploy.training.wrapping import named_parameters

#: Each process takes half of every batch.
HALF = alone.BATCH // 2


def found(model, force):
    """Return what has to be that of one process."""
    return {
        "dead": force.regularizer.dead(),
        "history": force.history,
        "weights": {name: whole(weight).detach().clone() for name, weight in named_parameters(model)},
    }


def lightning_ddp(plan, data, place):
    """Train with `Trainer(strategy="ddp")`."""
    module = alone.module_of(lightning)
    force = alone.controller(module.network, plan)
    # as the processes share a batch; Lightning's own sampler would shuffle
    sampler = DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False)
    alone.fit(
        module,
        lightning.PruningCallback(force),
        data,
        alone.EPOCHS,
        place,
        loader=DataLoader(data, HALF, sampler=sampler),
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,
    )
    return found(module.network, force)


def hugging_face_ddp(plan, data, place):
    """Train with the `Trainer`, which wraps the network by DistributedDataParallel."""
    trainer = alone.trainer_of(data, place, alone.EPOCHS, batch=HALF, ddp_backend="gloo", save_strategy="no")
    force = alone.controller(trainer.model.network, plan)
    huggingface.attach(trainer, force)
    trainer.train()
    return found(trainer.model.network, force)


def main(folder):
    """Do all of it as one of two processes, and leave what was found in a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plan, data = two_processes.plan(), alone.samples()
    answers = {"lightning": lightning_ddp(plan, data, folder)}
    leave_group()
    # the first group has used up what torchrun lets processes meet at
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = Path(folder, "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    answers["hugging face"] = hugging_face_ddp(plan, data, folder)
    torch.save(answers, Path(folder, f"answers-{rank}.pt"))
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1])
