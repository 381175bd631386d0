"""Pruning while the Hugging Face `Trainer` trains: `attach(trainer, controller)`.

It needs `transformers` and `accelerate`.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, cast

import torch

from etp_deploy.errors import UsageError
from etp_deploy.training.scheduled import check_every

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "etp_deploy.training.huggingface needs Transformers: pip install transformers accelerate"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from etp_deploy.training.scheduled import Scheduled

# where the state lies among the callbacks' in trainer_state.json
_KEY = "etp_deploy"


class PruningCallback(TrainerCallback):
    """Applies the force at each optimiser step, updates after each epoch, logs, and is part of checkpoints.

    With `proximal` the weights are shrunk after each step of the optimiser, by the first parameter group's learning
    rate; without, the penalty's gradient is added before it, once all batches are accumulated and the gradients are
    unscaled and clipped. Either way the force acts once a step, however many batches it takes.

    Args:
        force: a `Scheduled` force or a `Controller`, on the model that the trainer trains.
        every: update after each so many optimiser steps; None for after each epoch.
        log: told of strength, dead counts, norms and forces at each update; `attach` gives the trainer's own.

    Raises:
        UsageError: `every` is not positive.
    """

    def __init__(
        self,
        force: Scheduled,
        *,
        every: int | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        check_every(every)
        self.force = force
        self._every = every
        self._log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the state of the checkpoint that the trainer resumes from.

        Raises:
            UsageError: it was written without pruning, or is of other groups.
        """
        del args, control, kwargs
        if not state.global_step:
            return
        saved = _saved(state).get(_KEY)
        if saved is None:
            raise UsageError("the checkpoint was written without pruning", where=_KEY)
        data = io.BytesIO(base64.b64decode(saved["attributes"]["force"]))
        self.force.load_state_dict(torch.load(data, weights_only=True))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add gradients, where the force works so."""
        del args, state, control, kwargs
        if not self.force.proximal:
            self.force.add_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink and hold, unless the gradient scaler had the step left out."""
        del args, state, control
        optimizer: Optimizer = kwargs["optimizer"]
        if not getattr(optimizer, "step_was_skipped", False):
            self.force.step(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update, where that is asked for after so many steps."""
        del args, kwargs
        if self._every is not None and state.global_step % self._every == 0:
            self._update()
        self._note(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update, where that is asked for after each epoch."""
        del args, kwargs
        if self._every is None:
            self._update()
        self._note(state, control)

    def _update(self) -> None:
        self.force.update()
        if self._log is not None:
            self._log(self.force.metrics())

    def _note(self, state: TrainerState, control: TrainerControl) -> None:
        """Put the state where the trainer is about to save its own: a JSON file."""
        if control.should_save:
            data = io.BytesIO()
            torch.save(self.force.state_dict(), data)
            text = base64.b64encode(data.getvalue()).decode()
            _saved(state)[_KEY] = {"args": {}, "attributes": {"force": text}}


def _saved(state: TrainerState) -> dict[str, Any]:
    """Return the callbacks' states, by name: a list of callbacks until the trainer has made its state."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def attach(trainer: Trainer, force: Scheduled, *, every: int | None = None) -> PruningCallback:
    """Let a trainer prune, and log what it does.

        trainer = Trainer(model, arguments, train_dataset=data)
        attach(trainer, Controller(regularizer, "macs:0.5", updates=20, example_inputs=x))
        trainer.train()

    Args:
        trainer: the trainer.
        force: a `Scheduled` force or a `Controller`, on its model.
        every: update after each so many optimiser steps; None for after each epoch.

    Raises:
        UsageError: `every` is not positive.
    """
    callback = PruningCallback(force, every=every, log=trainer.log)
    trainer.add_callback(callback)
    return callback
