"""Pruning while Lightning trains: `Trainer(callbacks=[PruningCallback(controller)])`. It needs `lightning`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etp_deploy.errors import UsageError
from etp_deploy.training.scheduled import check_every

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError("etp_deploy.training.lightning needs Lightning: pip install lightning") from error

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from etp_deploy.training.scheduled import Scheduled


class PruningCallback(Callback):
    """Applies the force at each optimiser step, updates after each epoch, logs, and is part of checkpoints.

        regularizer = make("group_lasso", module.network, groups, beta=0.02)
        controller = Controller(regularizer, "macs:0.5", updates=20, example_inputs=x)
        Trainer(max_epochs=30, callbacks=[PruningCallback(controller)]).fit(module)

    With `proximal` the weights are shrunk after each step of the optimiser, by the first parameter group's learning
    rate; without, the penalty's gradient is added before it, once all batches are accumulated and the gradients are
    unscaled, and before Lightning clips them. Either way the force acts once a step, however many batches it takes.

    Args:
        force: a `Scheduled` force or a `Controller`, on the network that the module trains.
        every: update after each so many optimiser steps; None for after each epoch.
        log: whether strength, dead counts, norms and forces go to the trainer's logger at each update.

    Raises:
        UsageError: `every` is not positive.
    """

    def __init__(self, force: Scheduled, *, every: int | None = None, log: bool = True) -> None:
        check_every(every)
        self.force = force
        self._every = every
        self._log = log
        self._steps = 0
        # of the step that the optimiser takes in this batch; the scheduler has moved on when the batch ends
        self._rate: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no one learning rate.

        Raises:
            UsageError: there are several optimisers.
        """
        del pl_module
        if len(trainer.optimizers) != 1:
            what = f"there are {len(trainer.optimizers)} optimisers"
            raise UsageError(what, where="PruningCallback", hint="call force.step(rate) by hand")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add gradients, where the force works so."""
        del trainer, pl_module
        self._rate = float(optimizer.param_groups[0]["lr"])
        if not self.force.proximal:
            self.force.add_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shrink and hold, where the optimiser took a step in this batch."""
        del trainer, outputs, batch, batch_idx
        if self._rate is None:
            return
        self.force.step(self._rate)
        self._rate = None
        self._steps += 1
        if self._every is not None and self._steps % self._every == 0:
            self._update(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update, where that is asked for after each epoch."""
        del trainer
        if self._every is None:
            self._update(pl_module)

    def _update(self, pl_module: LightningModule) -> None:
        self.force.update()
        if self._log:
            pl_module.log_dict(self.force.metrics())

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs; Lightning puts it into its checkpoints."""
        return {"force": self.force.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            UsageError: the checkpoint is of other groups.
        """
        self.force.load_state_dict(state_dict["force"])
        self._steps = int(state_dict["steps"])
