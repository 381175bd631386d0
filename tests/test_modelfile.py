"""Reading refuses what is broken or hostile; writing is whole, clean and changes nothing else."""

from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from etp_deploy import modelfile
from etp_deploy.errors import ModelError, OutputError
from etp_deploy.modelfile import check_model, read_model, write_model


def small_model(size: int = 512) -> onnx.ModelProto:
    """Return y = x @ w + b with `size` columns."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=(4, size)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.normal(size=(size,)).astype(np.float32), "b"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="first"),
        helper.make_node("Add", ["m", "b"], ["y"], name="second"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", size])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def saved(proto: onnx.ModelProto, path, *, external: str = "") -> None:
    """Save a model as other tools do, optionally with external data."""
    arguments = {"save_as_external_data": True, "location": external, "size_threshold": 0} if external else {}
    onnx.save(proto, path, **arguments)


def run(path) -> np.ndarray:
    """Return what ONNX Runtime computes for a fixed input."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.arange(8, dtype=np.float32).reshape(2, 4)})[0]


def names(folder) -> list[str]:
    """Return what lies in a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir())


def refused(path, match: str) -> None:
    """Assert that reading fails with one line that names the file."""
    with pytest.raises(ModelError, match=match) as caught:
        read_model(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    assert caught.value.hint


def test_a_round_trip_keeps_versions_names_and_numbers(tmp_path):
    """IR version, opset, names, free dimensions and results survive reading and writing."""
    saved(small_model(), tmp_path / "a.onnx")
    write_model(read_model(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    before, after = onnx.load(tmp_path / "a.onnx"), onnx.load(tmp_path / "b.onnx")
    assert (after.ir_version, after.opset_import[0].version) == (8, 17)
    assert [node.name for node in after.graph.node] == [node.name for node in before.graph.node]
    assert after.graph.input == before.graph.input
    assert np.array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))


@pytest.mark.parametrize("external_out", [False, True])
def test_external_data_is_read_mapped_and_written_either_way(tmp_path, external_out):
    """A model with external data can be written with everything inside or with data of its own."""
    saved(small_model(), tmp_path / "a.onnx", external="weights.bin")
    model = read_model(tmp_path / "a.onnx")
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    (tmp_path / "out").mkdir()
    write_model(model, tmp_path / "out" / "b.onnx", external_data=external_out)
    expected = ["b.onnx", "b.onnx.data"] if external_out else ["b.onnx"]
    assert names(tmp_path / "out") == expected
    assert np.array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "out" / "b.onnx"))
    check_model(tmp_path / "out" / "b.onnx", full=True)


def test_a_large_model_gets_external_data_unasked(tmp_path, monkeypatch):
    """Past the size that protobuf can hold, tensors go beside the model and the model stays readable."""
    monkeypatch.setattr(modelfile, "INLINE_LIMIT_BYTES", 4096)
    saved(small_model(), tmp_path / "a.onnx")
    write_model(read_model(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.data").stat().st_size >= 4 * 512 * 4
    assert np.array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))


def test_writing_does_not_change_the_model(tmp_path):
    """The model in memory is the same before and after, external tensors included."""
    proto = small_model()
    proto.doc_string = "from /home/someone/train.py"
    saved(proto, tmp_path / "a.onnx", external="weights.bin")
    model = read_model(tmp_path / "a.onnx")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    write_model(model, tmp_path / "b.onnx", external_data=True, metadata={"k": "v"})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_rewriting_replaces_the_data_of_the_older_model(tmp_path):
    """Writing twice to one place leaves one model and one data file that fit together."""
    saved(small_model(), tmp_path / "a.onnx")
    saved(small_model(256), tmp_path / "c.onnx")
    for source in ("a.onnx", "c.onnx"):
        write_model(read_model(tmp_path / source), tmp_path / "b.onnx", external_data=True)
    assert len(list(tmp_path.glob("b.onnx*"))) == 2
    assert np.array_equal(run(tmp_path / "b.onnx"), run(tmp_path / "c.onnx"))


def test_a_failed_write_leaves_the_older_model_usable(tmp_path, monkeypatch):
    """When the last step fails, the older model still runs and nothing new lies about."""
    saved(small_model(), tmp_path / "a.onnx")
    write_model(read_model(tmp_path / "a.onnx"), tmp_path / "b.onnx", external_data=True)
    before, listing = run(tmp_path / "b.onnx"), names(tmp_path)
    saved(small_model(256), tmp_path / "c.onnx")
    other = read_model(tmp_path / "c.onnx")
    (tmp_path / "c.onnx").unlink()

    def fail(*_):
        raise OutputError("no space left", where="b.onnx")

    monkeypatch.setattr(modelfile, "_serialized", fail)
    with pytest.raises(OutputError):
        write_model(other, tmp_path / "b.onnx", external_data=True)
    assert names(tmp_path) == listing
    assert np.array_equal(run(tmp_path / "b.onnx"), before)


def test_the_input_and_its_data_are_never_overwritten(tmp_path):
    """The output may not be the input, and its data file never takes the name of one in use."""
    saved(small_model(), tmp_path / "a.onnx", external="b.onnx.data")
    model = read_model(tmp_path / "a.onnx")
    data = (tmp_path / "b.onnx.data").read_bytes()
    with pytest.raises(OutputError, match="the output is the input"):
        write_model(model, tmp_path / "a.onnx", inputs=(tmp_path / "a.onnx",))
    with pytest.raises(OutputError, match="the output is the input"):
        write_model(model, tmp_path / "b.onnx.data", inputs=(tmp_path / "a.onnx",))
    write_model(model, tmp_path / "b.onnx", inputs=(tmp_path / "a.onnx",), external_data=True)
    write_model(model, tmp_path / "b.onnx", inputs=(tmp_path / "a.onnx",), external_data=True)
    assert (tmp_path / "b.onnx.data").read_bytes() == data
    assert np.array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))


def test_bookkeeping_and_paths_are_stripped(tmp_path):
    """Stack traces, exporters' entries and optimizers' keys go; the author's own metadata stays."""
    proto = small_model()
    node = proto.graph.node[0]
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/someone/model.py", line 3')
    node.metadata_props.add(key="own", value="kept")
    proto.graph.node[1].doc_string = "/home/someone/model.py(12): forward"
    proto.graph.input[0].metadata_props.add(
        key="pkg.torch.export.graph_signature.InputSpec.kind", value="USER"
    )
    proto.graph.doc_string = "a classifier of and/or gates, see https://example.org/gates"
    proto.metadata_props.add(key="onnxsim.version", value="0.8")
    proto.metadata_props.add(key="names", value="{0: 'cat', 1: 'dog'}")
    saved(proto, tmp_path / "a.onnx")
    write_model(read_model(tmp_path / "a.onnx"), tmp_path / "b.onnx", metadata={"etp_deploy.version": "1"})
    written = onnx.load(tmp_path / "b.onnx")
    for text in (b"someone", b"pkg.torch", b"onnxsim"):
        assert text not in (tmp_path / "b.onnx").read_bytes()
    entries = {entry.key: entry.value for entry in written.metadata_props}
    assert entries == {"names": "{0: 'cat', 1: 'dog'}", "etp_deploy.version": "1"}
    assert [entry.key for entry in written.graph.node[0].metadata_props] == ["own"]
    assert written.graph.doc_string == proto.graph.doc_string


def test_strip_reaches_subgraphs_and_functions():
    """Metadata inside an If branch and inside a local function goes as well."""
    trace = {"key": "pkg.torch.onnx.stack_trace", "value": "x"}
    inner = helper.make_node("Identity", ["x"], ["z"])
    inner.metadata_props.add(**trace)
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])])
    outer = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    call = helper.make_node("Identity", ["a"], ["b"])
    call.metadata_props.add(**trace)
    function = helper.make_function("own", "f", ["a"], ["b"], [call], [helper.make_opsetid("", 17)])
    proto = helper.make_model(helper.make_graph([outer], "g", [], []), functions=[function])
    assert b"pkg.torch" in proto.SerializeToString()
    modelfile.strip(proto)
    assert b"pkg.torch" not in proto.SerializeToString()


def test_files_that_are_no_models_are_named_for_what_they_are(tmp_path):
    """A zip, a pickle, text, an empty and a truncated file, random bytes: each has its own clear line."""
    file = tmp_path / "m.onnx"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", "x")
    refused(file, "zip archive")
    file.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    refused(file, "pickle")
    file.write_text("hello, world\n" * 10)
    refused(file, "text file")
    file.write_bytes(b"")
    refused(file, "the file is empty")
    file.write_bytes(small_model().SerializeToString()[:-100])
    refused(file, "truncated")
    file.write_bytes(np.random.default_rng(0).bytes(1000))
    refused(file, "not an ONNX model")


def test_places_that_are_no_regular_files_are_refused(tmp_path):
    """A missing file, a folder, a FIFO, a device and a name with NUL are refused without waiting."""
    refused(tmp_path / "missing.onnx", "No such file")
    refused(tmp_path, "folder")
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")
    refused("/dev/zero", "not a regular file")
    refused("a\0.onnx", "cannot read")


def test_incomplete_models_are_refused(tmp_path):
    """No graph, no opset, no IR version, duplicate, unnamed and sparse initializers."""
    file = tmp_path / "m.onnx"
    for change, match in (
        (lambda m: m.ClearField("graph"), "no graph"),
        (lambda m: m.ClearField("opset_import"), "which opset"),
        (lambda m: m.opset_import[0].ClearField("version"), "which opset"),
        (lambda m: m.ClearField("ir_version"), "IR version"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two initializers are called 'w'"),
        (lambda m: m.graph.initializer[0].ClearField("name"), "no name"),
        (lambda m: m.graph.sparse_initializer.add(), "sparse"),
        (
            lambda m: m.graph.initializer[0].ClearField("raw_data"),
            "holds 0 entries where its shape needs 2048",
        ),
        (lambda m: m.graph.initializer[0].dims.append(2), "holds 8192 bytes where its shape needs 16384"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -4), "negative dimension"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 77), "unknown type 77"),
        (lambda m: m.graph.node[1].input.__setitem__(0, "other"), "nothing defines value 'other'"),
        (lambda m: m.graph.output[0].ClearField("name"), "nothing defines value ''"),
        (lambda m: m.graph.node[1].output.__setitem__(0, "m"), "value 'm' is defined twice"),
        (lambda m: m.graph.node[0].ClearField("op_type"), "no operator"),
    ):
        proto = small_model()
        change(proto)
        file.write_bytes(proto.SerializeToString())
        refused(file, match)


def test_damaged_files_are_refused_or_written(tmp_path):
    """Random damage ends in a ModelError or in a model that can be written and read again."""
    rng = np.random.default_rng(0)
    whole = small_model(2).SerializeToString()
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        place = int(rng.integers(len(data)))
        if rng.random() < 0.5:
            data[place] = int(rng.integers(256))
        else:
            del data[place : place + int(rng.integers(1, 20))]
        (tmp_path / "m.onnx").write_bytes(data)
        try:
            write_model(read_model(tmp_path / "m.onnx"), tmp_path / "o.onnx")
            read_model(tmp_path / "o.onnx")
            outcomes.add("written")
        except ModelError as error:
            outcomes.add(f"refused in {len(str(error).splitlines())} line")
    assert outcomes == {"written", "refused in 1 line"}


def external(path, **entries: str) -> None:
    """Write a model whose tensor 'w' claims external data with these entries."""
    proto = small_model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def test_external_data_outside_the_folder_is_refused(tmp_path):
    """Climbing, absolute, linked and non-regular places are refused before anything opens them."""
    folder = tmp_path / "in"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(8192))
    (folder / "link").symlink_to(secret)
    (folder / "hard").hardlink_to(secret)
    os.mkfifo(folder / "pipe")
    for place, match in (
        ("../secret", "wants external data at"),
        ("a/../../secret", "wants external data at"),
        (str(secret), "wants external data at"),
        ("C:\\secret", "wants external data at"),
        ("..\\secret", "wants external data at"),
        ("link\0", "wants external data at"),
        ("", "wants external data at"),
        ("link", "link to a place outside"),
        ("hard", "hard link"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
    ):
        external(folder / "m.onnx", location=place)
        refused(folder / "m.onnx", match)


def test_external_data_that_is_missing_or_too_short_is_refused(tmp_path):
    """The data file must be there and as long as offset, length and shape say."""
    file = tmp_path / "m.onnx"
    (tmp_path / "w.bin").write_bytes(bytes(8192))
    for entries, match in (
        ({"location": "none.bin"}, "No such file"),
        ({"location": "w.bin", "offset": "4"}, "truncated: 8192 bytes where 8196"),
        ({"location": "w.bin", "length": "4"}, "4 bytes where its shape needs 8192"),
        ({"location": "w.bin", "offset": "-4"}, "no valid offset"),
        ({"location": "w.bin", "offset": "many"}, "no valid offset"),
    ):
        external(file, **entries)
        refused(file, match)
    external(file, location="w.bin", offset="0", length="8192")
    assert read_model(file).graph.initializers["w"].const_value.numpy().shape == (4, 512)


def test_the_checker_speaks_in_one_line(tmp_path):
    """A model the checker refuses is a ModelError; a good one passes."""
    saved(small_model(), tmp_path / "good.onnx")
    check_model(tmp_path / "good.onnx", full=True)
    proto = small_model()
    proto.graph.node[0].op_type = "NoSuchOperator"
    saved(proto, tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="NoSuchOperator") as caught:
        check_model(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)
