"""Exports are compared with the module, clean of the author's machine, and leave the module as it was."""

from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest

from etp_deploy.errors import ExportError, OutputError, UsageError
from etp_deploy.exporting import (
    DynamicAxis,
    InputDeclaration,
    build_module,
    export,
    load_factory,
    load_weights,
    parse_dynamic,
    parse_input,
)

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

FACTORY = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())

def fails():
    raise RuntimeError("no data\\nat all")

def number():
    return 3

value = 3
"""


class Convolutional(torch.nn.Module):
    """A convolution with BatchNormalization and dropout: evaluation differs from training."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.5),
        )
        self.head = torch.nn.Linear(8, 5)
        self.features[1].running_mean.normal_()

    def forward(self, image):
        """Return scores [batch, 5] of images [batch, 3, height, width]."""
        return self.head(self.features(image).mean((2, 3)))


class Tokens(torch.nn.Module):
    """An encoder over token ids with a position table of 20 and multi-head attention."""

    def __init__(self):
        super().__init__()
        self.words, self.places = torch.nn.Embedding(50, 16), torch.nn.Embedding(20, 16)
        self.layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, ids, scale=None):
        """Return hidden states [batch, length, 16] of ids [batch, length]."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return {"hidden": self.layer(x if scale is None else x * scale), "nothing": None}


class Guarded(torch.nn.Module):
    """A division guarded by 1e-9, which dynamo's optimisation drops."""

    def forward(self, x):
        """Return 1 where x is positive, else 0."""
        y = torch.relu(x)
        return y / (y + 1e-9)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """Put a module of factories into the current folder."""
    (tmp_path / "own_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield "own_factories"
    sys.modules.pop("own_factories", None)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_an_export_equals_the_module_at_other_sizes_too(tmp_path, exporter, capfd):
    """The file agrees with the module in evaluation mode, with a free batch, and nothing is printed."""
    module = Convolutional().train()
    module.head.eval()
    file = tmp_path / "a.onnx"
    report = export(module, ["image=1x3x8x8"], file, dynamic=["image.0=batch"], exporter=exporter)
    assert report.samples == 4
    assert report.max_rel_error < 1e-5
    assert (report.inputs, report.opset) == (("image",), 20)
    assert json.loads(json.dumps(report.to_json()))["exporter"] == exporter
    assert module.training
    assert module.features[3].training
    assert not module.head.training
    assert onnx.load(file).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert capfd.readouterr().out == ""


def test_an_export_holds_nothing_of_the_authors_machine(tmp_path):
    """No stack trace, no path and no exporter's bookkeeping is in the file, which dynamo would leave."""
    export(torch.nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "a.onnx", metadata={"own": "entry"})
    data = (tmp_path / "a.onnx").read_bytes()
    for text in (b"stack_trace", b"pkg.torch", b".py", str(tmp_path).encode(), b"/home", b"/usr"):
        assert text not in data
    assert [entry.key for entry in onnx.load(tmp_path / "a.onnx").metadata_props] == ["own"]


def test_token_ids_are_drawn_to_their_real_range(tmp_path):
    """Ids reach all of the table, and lengths beyond the position table are skipped by name."""
    report = export(
        Tokens(), ["ids=1x16:int64"], tmp_path / "a.onnx", dynamic=["ids.0=batch", "ids.1=length"]
    )
    assert report.samples == 5
    assert [note for note in report.notes if "[2, 32]" in note]


def test_a_wrong_export_is_refused(tmp_path):
    """The division by a guarded zero, which dynamo's optimisation breaks, leaves no file."""
    with pytest.raises(ExportError, match="differs from the module: output 0 has NaN") as caught:
        export(Guarded(), torch.tensor([[-1.0, 2.0]]), tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert export(Guarded(), torch.ones(2, 2), tmp_path / "a.onnx", exporter="torchscript").samples == 4


def test_a_changed_module_is_noticed(tmp_path, monkeypatch):
    """The negative control: a weight off by a hundredth between tracing and comparing is an error."""
    from etp_deploy import exporting  # noqa: PLC0415 - only to reach into it

    module = torch.nn.Linear(4, 3)
    trace = exporting.trace

    def trace_then_change(*arguments, **options):
        model = trace(*arguments, **options)
        with torch.no_grad():
            module.weight[1, 2] += 0.01
        return model

    monkeypatch.setattr(exporting, "trace", trace_then_change)
    with pytest.raises(ExportError, match="differs from the module"):
        export(module, torch.ones(2, 4), tmp_path / "a.onnx", exporter="torchscript")
    export(module, torch.ones(2, 4), tmp_path / "a.onnx", exporter="torchscript", check=False)


def test_a_size_that_tracing_fixed_is_noticed(tmp_path):
    """A batch that the exporter made a constant is an error, not a file that fails later."""
    module = torch.nn.Module()
    module.forward = lambda x: x.reshape(int(x.shape[0]) * 2, 2)
    with pytest.raises(ExportError, match="does not run at x") as caught:
        export(module, torch.ones(2, 4), tmp_path / "a.onnx", dynamic=["x.0=n"], exporter="torchscript")
    assert "\n" not in str(caught.value)


def test_attention_is_exported_by_torchscript(tmp_path):
    """The fast path that cannot be traced is off during the export and on again after it."""
    before = torch.backends.mha.get_fastpath_enabled()
    report = export(Tokens(), ["ids=2x16:int64"], tmp_path / "a.onnx", exporter="torchscript", opset=17)
    assert report.opset == 17
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_inputs_by_keyword_reach_their_arguments(tmp_path):
    """Declared in any order, inputs go to the arguments of their names."""
    arguments = ["scale=1:float32", InputDeclaration("ids", (2, 16), "int64")]
    report = export(Tokens(), arguments, tmp_path / "a.onnx", exporter="torchscript")
    assert report.inputs == ("ids", "scale")
    tensors = {"scale": torch.ones(1), "ids": torch.zeros(2, 16, dtype=torch.int64)}
    assert export(Tokens(), tensors, tmp_path / "b.onnx", exporter="torchscript").inputs == ("ids", "scale")


def test_impossible_exports_are_one_line(tmp_path):
    """Wrong exporter, wrong axis, wrong input, no folder, a module that fails: each its own kind."""
    module, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
    for arguments, kind in (
        ({"exporter": "other"}, UsageError),
        ({"dynamic": ["y.0=batch"]}, UsageError),
        ({"dynamic": [DynamicAxis("input", 5, "batch")]}, UsageError),
        ({"args": [3]}, UsageError),
        ({"path": tmp_path / "none" / "a.onnx"}, OutputError),
        ({"args": torch.ones(2, 5)}, ExportError),
    ):
        options = {"args": x, "path": tmp_path / "a.onnx", "exporter": "torchscript", **arguments}
        with pytest.raises(kind) as caught:
            export(module, **options)
        assert "\n" not in str(caught.value)
        assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_declarations_are_parsed():
    """Names may hold dots and equals signs; types are torch's."""
    assert parse_input("x=1x3x8x8") == InputDeclaration("x", (1, 3, 8, 8), "float32")
    assert parse_input("a.b=scalar:int64") == InputDeclaration("a.b", (), "int64")
    assert parse_dynamic("a.b.10=batch") == DynamicAxis("a.b", 10, "batch")
    for text in ("x", "=1x2", "x=", "x=1xb", "x=-1x2", "x=0x2", "x=1:complex"):
        with pytest.raises(UsageError):
            parse_input(text)
    for text in ("x=batch", "x.a=batch", "x.0=", "x.0=a b", ".0=batch"):
        with pytest.raises(UsageError):
            parse_dynamic(text)


def test_a_factory_in_the_current_folder_is_found(factory):
    """The module is imported from the current folder, and the search path is as before."""
    before = list(sys.path)
    assert isinstance(build_module(f"{factory}:build"), torch.nn.Module)
    assert load_factory(f"{factory}:build").__name__ == "build"
    assert sys.path == before


def test_factories_that_do_not_work_are_one_line(factory):
    """A missing module, a missing name, a failure, another type: each says which."""
    for spec, kind, match in (
        ("nothing", UsageError, "not a factory"),
        ("no_such_module:build", ExportError, "cannot import"),
        (f"{factory}:other", ExportError, "has no 'other'.*build"),
        (f"{factory}:value", ExportError, "cannot be called"),
        (f"{factory}:fails", ExportError, "the factory failed: RuntimeError: no data"),
        (f"{factory}:number", ExportError, "returned int"),
    ):
        with pytest.raises(kind, match=match) as caught:
            build_module(spec)
        assert "\n" not in str(caught.value)
        assert caught.value.hint


def test_weights_are_loaded(factory, tmp_path):
    """From a state dict, from one within a checkpoint, and from DataParallel's."""
    module = build_module(f"{factory}:build")
    state = module.state_dict()
    prefixed = {f"module.{key}": value for key, value in state.items()}
    for i, saved in enumerate((state, {"state_dict": state, "epoch": 3}, prefixed)):
        torch.save(saved, tmp_path / f"{i}.pt")
        loaded = build_module(f"{factory}:build", tmp_path / f"{i}.pt")
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())


def test_safetensors_are_loaded(factory, tmp_path):
    """A file of safetensors is read where the package is installed."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    module = build_module(f"{factory}:build")
    safetensors.save_file(module.state_dict(), tmp_path / "a.safetensors")
    loaded = build_module(f"{factory}:build", tmp_path / "a.safetensors")
    assert torch.equal(loaded[0].weight, module[0].weight)


def test_weights_that_do_not_fit_are_named(factory, tmp_path):
    """Missing, unknown and misshapen keys, and what is no weights at all."""
    module = build_module(f"{factory}:build")
    state = module.state_dict()
    file = tmp_path / "w.pt"
    for saved, match in (
        ({"0.weight": state["0.weight"]}, "the file lacks 0.bias"),
        ({**state, "9.weight": state["0.bias"]}, "the module has no 9.weight"),
        ({**state, "0.bias": torch.zeros(7)}, "shapes differ for 0.bias"),
        ({}, "the file lacks 0.weight, 0.bias"),
        ([1, 2], "no dictionary of tensors"),
        (module, "cannot read the weights"),
    ):
        torch.save(saved, file)
        with pytest.raises(ExportError, match=match) as caught:
            load_weights(module, file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="no such file"):
        load_weights(module, tmp_path / "none.pt")
    file.write_bytes(b"not weights")
    with pytest.raises(ExportError, match="cannot read the weights"):
        load_weights(module, file)


def test_without_torch_the_hint_says_what_to_install(tmp_path):
    """The module imports without torch, and its use says how to get it."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
from etp_deploy.exporting import export
from etp_deploy.errors import ExportError
try:
    export(None, None, {str(tmp_path / "a.onnx")!r})
except ExportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PyTorch is not installed (pip install 'etp-deploy[train]')", done.stderr
