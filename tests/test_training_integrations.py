"""Pruning inside Lightning's and Hugging Face's trainers: the bits of a plain loop, logged, resumed."""

import csv
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import two_processes
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from etp_deploy import training
from etp_deploy.errors import UsageError
from etp_deploy.training import Controller, make

RATE, BATCH, ACCUMULATED, EPOCHS = 0.1, 16, 2, 5


@pytest.fixture(scope="module")
def plan():
    """Blueprint and groups of the network."""
    return two_processes.plan()


def samples():
    """Bright noise and dark: 8 batches, 4 steps an epoch."""
    torch.manual_seed(0)
    wanted = torch.arange(8 * BATCH) % 2 * 2.0 - 1
    return TensorDataset(torch.randn(8 * BATCH, 1, 6, 6) + 3 * wanted.reshape(-1, 1, 1, 1), wanted)


@pytest.fixture(scope="module")
def data():
    """The samples, made once."""
    return samples()


def controller(model, plan, *, proximal=True):
    """The force on a network's way to 40 % of its parameters."""
    blueprint, groups = plan
    regularizer = make("group_lasso", model, groups, beta=0.03)
    return Controller(regularizer, "params:0.4", updates=4, blueprint=blueprint, proximal=proximal)


def optimizers(model):
    """The optimiser, and a schedule whose rate changes at each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def loss_of(model, images, wanted):
    """The loss of a batch."""
    return nn.functional.mse_loss(model(images)[:, 0].float(), wanted)


def by_hand(plan, data, *, autocast, proximal):
    """What a loop by hand ends in."""
    model = two_processes.network()
    force, (optimizer, scheduler) = controller(model, plan, proximal=proximal), optimizers(model)
    for _ in range(EPOCHS):
        for number, (images, wanted) in enumerate(DataLoader(data, BATCH)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, images, wanted)
            (loss / ACCUMULATED).backward()
            if number % ACCUMULATED < ACCUMULATED - 1:
                continue
            if not proximal:
                force.add_gradients()
            optimizer.step()
            force.step(optimizer.param_groups[0]["lr"])
            scheduler.step()
            optimizer.zero_grad()
        force.update()
    return model, force


@pytest.fixture(scope="module")
def plain(plan, data):
    """The same, by precision and way to apply the force."""
    ways = ((False, True), (True, True), (False, False))
    return {
        (autocast, proximal): by_hand(plan, data, autocast=autocast, proximal=proximal)
        for autocast, proximal in ways
    }


@pytest.fixture(scope="module")
def task(plan, data, plain):
    """All of these."""
    return plan, data, plain


def assert_same(found, force, wanted):
    """The same bits, the same history, something dead, and the target reached."""
    model, other = wanted
    for weight, expected in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, expected)
    assert force.history == other.history
    assert force.done
    assert force.history[-1].dead > 0


# Lightning


@pytest.fixture(scope="module")
def lightning():
    """The callback's module."""
    return importlib.import_module("etp_deploy.training.lightning")


def module_of(lightning, *, count=1):
    """A module around the network."""
    from lightning.pytorch import LightningModule  # noqa: PLC0415 - takes seconds, and may be absent

    del lightning

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.network = two_processes.network()
            self.automatic_optimization = count == 1

        def training_step(self, batch, number):
            del number
            return loss_of(self.network, *batch)

        def configure_optimizers(self):
            found = [optimizers(self.network) for _ in range(count)]
            return [pair[0] for pair in found], [{"scheduler": pair[1], "interval": "step"} for pair in found]

    return Module()


def fit(module, callback, data, epochs, place, *, precision="32-true", resume=None, loader=None, **options):
    """Train with Lightning."""
    from lightning.pytorch import Trainer  # noqa: PLC0415 - as above
    from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415 - as above

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        precision=precision,
        accumulate_grad_batches=ACCUMULATED,
        logger=CSVLogger(place),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, loader or DataLoader(data, BATCH), ckpt_path=resume, weights_only=resume is not None)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [("32-true", True), ("bf16-mixed", True), ("32-true", False)])
def test_lightning_trains_to_the_bits_of_a_plain_loop(how, lightning, task, tmp_path):
    """With accumulated batches, a rate that changes each step, mixed precision, and gradients instead of steps."""
    (precision, proximal), (plan, data, plain) = how, task
    module = module_of(lightning)
    force = controller(module.network, plan, proximal=proximal)
    trainer = fit(module, lightning.PruningCallback(force), data, EPOCHS, tmp_path, precision=precision)
    assert_same(module.network, force, plain[precision != "32-true", proximal])
    assert trainer.callback_metrics["etp/dead"] == force.history[-1].dead
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        dead = [float(row["etp/2/dead"]) for row in csv.DictReader(file) if row["etp/2/dead"]]
    assert len(dead) == EPOCHS
    assert dead[-1] == int(force.regularizer.dead()["2"].sum()) > 0


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_to_the_same_bits(lightning, plan, data, plain, tmp_path):
    """The checkpoint holds the force; it is read with `weights_only`."""
    module = module_of(lightning)
    callback = lightning.PruningCallback(controller(module.network, plan))
    fit(module, callback, data, 3, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    module = module_of(lightning)
    force = controller(module.network, plan)
    fit(module, lightning.PruningCallback(force), data, EPOCHS, tmp_path, resume=tmp_path / "half.ckpt")
    assert_same(module.network, force, plain[False, True])


@pytest.mark.filterwarnings("ignore")
def test_lightning_updates_each_so_many_steps(lightning, plan, data, tmp_path):
    """Two updates an epoch of four steps; nothing but a positive number is taken."""
    module = module_of(lightning)
    force = controller(module.network, plan)
    fit(module, lightning.PruningCallback(force, every=2), data, 1, tmp_path)
    assert len(force.history) == 2
    with pytest.raises(UsageError, match="every 0 steps"):
        lightning.PruningCallback(force, every=0)


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_several_optimisers_is_refused(lightning, plan, data):
    """There is no one learning rate then."""
    from lightning.pytorch import Trainer  # noqa: PLC0415 - as above

    module = module_of(lightning, count=2)
    callback = lightning.PruningCallback(controller(module.network, plan))
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False, max_epochs=1
    )
    with pytest.raises(UsageError, match="2 optimisers"):
        trainer.fit(module, DataLoader(data, BATCH))


# Hugging Face


@pytest.fixture(scope="module")
def huggingface():
    """The callback's module."""
    return importlib.import_module("etp_deploy.training.huggingface")


class Wanted(nn.Module):
    """The network as the Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.network = two_processes.network()

    def forward(self, images, labels):
        """Return loss and scores."""
        return {"loss": loss_of(self.network, images, labels), "logits": labels}


def trainer_of(data, place, epochs, *, batch=BATCH, **options):
    """A Trainer that draws its batches in order."""
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415 - takes seconds

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments):
            del arguments
            return SequentialSampler(self.train_dataset)

    model = Wanted()
    arguments = TrainingArguments(
        str(place),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=0.0,
        **{"save_strategy": "epoch", **options},
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"images": images, "labels": wanted} for images, wanted in data]
    return InOrder(model, arguments, train_dataset=rows, optimizers=optimizers(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [(False, True), (True, True), (False, False)])
def test_hugging_face_trains_to_the_bits_of_a_plain_loop(how, huggingface, task, tmp_path):
    """With accumulated batches, a rate that changes each step, mixed precision, and gradients instead of steps."""
    (bf16, proximal), (plan, data, plain) = how, task
    trainer = trainer_of(data, tmp_path, EPOCHS, bf16=bf16)
    force = controller(trainer.model.network, plan, proximal=proximal)
    huggingface.attach(trainer, force)
    trainer.train()
    assert_same(trainer.model.network, force, plain[bf16, proximal])
    logged = [row["etp/dead"] for row in trainer.state.log_history if "etp/dead" in row]
    assert logged == [found.dead for found in force.history]


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_resumes_to_the_same_bits(huggingface, plan, data, plain, tmp_path):
    """From the trainer's own checkpoint of the third epoch; one without the force is refused."""
    trainer = trainer_of(data, tmp_path, EPOCHS)
    huggingface.attach(trainer, controller(trainer.model.network, plan))
    trainer.train()
    half = tmp_path / "checkpoint-12"
    trainer = trainer_of(data, tmp_path / "again", EPOCHS)
    force = controller(trainer.model.network, plan)
    huggingface.attach(trainer, force)
    trainer.train(resume_from_checkpoint=str(half))
    assert_same(trainer.model.network, force, plain[False, True])
    state = json.loads((half / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["etp_deploy"]
    (half / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match="without pruning"):
        trainer.train(resume_from_checkpoint=str(half))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_updates_each_so_many_steps(huggingface, plan, data, tmp_path):
    """Two updates an epoch of four steps, and no shrinking in a step that the scaler left out."""
    trainer = trainer_of(data, tmp_path, 1)
    force = controller(trainer.model.network, plan)
    callback = huggingface.attach(trainer, force, every=2)
    trainer.train()
    assert len(force.history) == 2
    with pytest.raises(UsageError, match="every 0 steps"):
        huggingface.PruningCallback(force, every=0)
    weight = trainer.model.network[0].weight
    for skipped in (True, False):
        before = weight.clone()
        optimizer = SimpleNamespace(step_was_skipped=skipped, param_groups=[{"lr": RATE}])
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        assert torch.equal(weight, before) == skipped


# both


@pytest.mark.parametrize(
    ("name", "package", "hint"),
    [
        ("lightning", "lightning.pytorch", "pip install lightning"),
        ("huggingface", "transformers", "accelerate"),
    ],
)
def test_an_absent_package_is_named(name, package, hint, monkeypatch):
    """Whoever lacks the package reads what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"etp_deploy.training.{name}", raising=False)
    with pytest.raises(ImportError, match=hint):
        importlib.import_module(f"etp_deploy.training.{name}")


def test_nothing_else_imports_the_packages():
    """The training package works without Lightning, Transformers and Accelerate."""
    pattern = re.compile(r"^\s*(?:from|import) (lightning|transformers|accelerate)\b", re.MULTILINE)
    users = {
        path.stem: set(pattern.findall(path.read_text()))
        for path in Path(training.__file__).parent.rglob("*.py")
    }
    assert {stem: found for stem, found in users.items() if found} == {
        "lightning": {"lightning"},
        "huggingface": {"transformers"},
    }
