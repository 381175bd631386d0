"""The command line: every command on tiny models, every bad input in one line, JSON pure, nothing heavy early."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from etp_deploy import pipeline
from etp_deploy.cli import main
from etp_deploy.cli.terminal import emit
from etp_deploy.runtime import EdgeModel

HEAVY = ("torch", "onnx", "onnxsim", "onnx_ir", "onnxruntime", "numpy", "rich", "scipy")
COMMANDS = ("export", "compress", "inspect", "verify", "bench", "compare", "bundle", "demo")
# loading onnxsim takes seconds; one test does
# what this machine is fastest at is not measured, so that the same comes out everywhere
TARGET = ("--target", "cpu-avx512")
PLAIN = ("--no-simplify", *TARGET)
QUICK = ("--sessions", "3", "--max-seconds", "1", "--no-memory")


def chain(path, *, channels=16, dead=6, tiny=0.0, seed=0):
    """Save Conv, Relu, Conv, pooling and Gemm; the last `dead` filters of the first hold their bias alone."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((channels, 3, 3, 3)).astype(np.float32)
    first[channels - dead :] = tiny
    weights = {
        "w0": first,
        "b0": rng.standard_normal(channels).astype(np.float32),
        "w1": rng.standard_normal((8, channels, 3, 3)).astype(np.float32),
        "w2": rng.standard_normal((8, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c1"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with a model, its compressed form, and files that are no models; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    chain(folder / "a.onnx")
    chain(folder / "other.onnx", seed=1)
    (folder / "empty.onnx").touch()
    (folder / "text.onnx").write_text("not a model at all\n" * 20)
    (folder / "half.onnx").write_bytes((folder / "a.onnx").read_bytes()[:500])
    (folder / "folder.onnx").mkdir()
    (folder / "list.json").write_text("[]")
    assert main(["compress", str(folder / "a.onnx"), "-o", str(folder / "c.onnx"), *PLAIN]) == 0
    return folder


def call(capfd, *arguments):
    """Run a command in this process; return its code and what it printed."""
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def program(*arguments, **options):
    """Run the program as a user does."""
    command = [sys.executable, "-c", "import sys; from etp_deploy.cli import main; sys.exit(main())"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


def test_compress_prints_sizes_and_what_went(models, capfd, tmp_path):
    """Before, after and ratio of each size, what went by kind, why dead ones stay, and the verification."""
    code, out, err = call(capfd, "compress", models / "a.onnx", "-o", tmp_path / "o.onnx", *PLAIN)
    assert (code, err) == (0, "")
    assert re.search(r"parameters\s+1,632\s+1,232\s+1\.32x", out)
    assert "removed 4 of 24 channels" in out
    assert "kept although dead" in out
    assert "verified on" in out
    assert (tmp_path / "o.onnx").is_file()


def test_compress_json_is_the_contract(models, capfd, tmp_path):
    """Stdout is one JSON document with all that is promised; the table goes to stderr."""
    code, out, err = call(capfd, "compress", models / "a.onnx", "-o", tmp_path / "o.onnx", *TARGET, "--json")
    document = json.loads(out)
    assert code == 0
    for key in ("parameters", "bytes", "macs", "nodes"):
        assert document[key]["before"] >= document[key]["after"] > 0
    assert document["removed"]["channels"] == 4
    assert document["removed"]["by_axis"]
    assert document["kept_dead"]
    assert all(entry["reason"] for entry in document["kept_dead"])
    found = document["verification"]
    assert found["passed"]
    assert {"max_abs_error", "max_rel_error", "samples", "seeds", "shapes"} <= set(found)
    assert document["seconds"]["verify"] > 0
    assert "parameters" in err


def test_align_off_removes_more_than_auto(models, capfd, tmp_path):
    """With --align off only the carrier of the constants stays, 11 of 16 channels."""
    arguments = ("compress", models / "a.onnx", "-o", tmp_path / "o.onnx", *PLAIN, "--align", "off", "--json")
    document = json.loads(call(capfd, *arguments)[1])
    assert document["removed"]["channels"] == 5


def test_threshold_is_hinted_and_applied(capfd, tmp_path):
    """Channels just below a millionth are hinted at, and gone with --zero-below 1e-6."""
    source = chain(tmp_path / "tiny.onnx", tiny=1e-9)
    out = call(capfd, "compress", source, "-o", tmp_path / "o.onnx", *PLAIN)[1]
    assert "6 more output channels" in out
    assert "--zero-below 1e-6" in out
    arguments = ("-o", tmp_path / "z.onnx", "--zero-below", "1e-6", "--json", *PLAIN)
    document = json.loads(call(capfd, "compress", source, *arguments)[1])
    assert document["removed"]["channels"] == 4


def test_no_verify_says_so(models, capfd, tmp_path):
    """An unverified result is called that, in words and in JSON."""
    arguments = ("compress", models / "a.onnx", "-o", tmp_path / "o.onnx", *PLAIN, "--no-verify", "--json")
    _, out, err = call(capfd, *arguments)
    assert json.loads(out)["verification"] is None
    assert "not verified" in err


def test_report_page_stands_alone(models, capfd, tmp_path):
    """The page has the sizes, the layers and the verification, and refers to nothing outside."""
    page = tmp_path / "r.html"
    assert (
        call(capfd, "compress", models / "a.onnx", "-o", tmp_path / "o.onnx", *PLAIN, "--report", page)[0]
        == 0
    )
    text = page.read_text()
    assert "verified" in text
    assert "<svg" in text
    assert "kept although dead" in text
    assert "channel counts at multiples of 4, for cpu-avx512" in text
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", text)


def test_inspect_lists_layers_and_explains(models, capfd):
    """The layers with something dead, all with --all, and the reasons along one axis."""
    code, out, _ = call(capfd, "inspect", models / "a.onnx")
    assert code == 0
    assert "c0" in out
    assert "2 layers with nothing dead" in out
    assert "c1" in call(capfd, "inspect", models / "a.onnx", "--all")[1]
    assert json.loads(call(capfd, "inspect", models / "a.onnx", "--json")[1])["totals"]["channels"]
    lines = call(capfd, "inspect", models / "a.onnx", "--explain", "c0:1")[1]
    assert "c0, axis 1" in lines
    assert "of 16 stay" in lines
    explained = json.loads(call(capfd, "inspect", models / "a.onnx", "--explain", "c0", "--json")[1])
    assert (explained["tensor"], explained["axis"]) == ("c0", 1)


def test_verify_answers_yes_or_no(models, capfd):
    """Equal models give 0, others 1 with the reason; JSON says the same."""
    code, out, _ = call(capfd, "verify", models / "a.onnx", models / "c.onnx", "--samples", 2, "--seed", 5)
    assert code == 0
    assert "verified on" in out
    code, out, _ = call(capfd, "verify", models / "a.onnx", models / "other.onnx")
    assert code == 1
    assert "do not agree" in out
    code, out, _ = call(capfd, "verify", models / "a.onnx", models / "other.onnx", "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False


def test_bench_writes_every_form_and_gates(models, capfd, tmp_path):
    """JSON on stdout and in a file, CSV, Markdown and page; the gate answers 0, and 1 for a larger model."""
    files = {kind: tmp_path / f"b.{kind}" for kind in ("json", "csv", "md", "html")}
    arguments = (
        "-o",
        files["json"],
        "--csv",
        files["csv"],
        "--markdown",
        files["md"],
        "--html",
        files["html"],
    )
    code, out, err = call(capfd, "bench", models / "a.onnx", models / "c.onnx", *QUICK, *arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["comparisons"][0]["verdict"] in {"faster", "slower", "undecided"}
    assert {"baseline", "contender", "ratio", "low", "high"} <= set(document["comparisons"][0])
    assert "p50 ms" in err
    assert json.loads(files["json"].read_text()) == document
    assert files["csv"].read_text().count("\n") == 3
    assert files["md"].read_text().startswith("| model")
    assert not re.search(r"https?://", files["html"].read_text())

    small = tmp_path / "small.json"
    assert call(capfd, "bench", models / "c.onnx", *QUICK, "-o", small)[0] == 0
    gate = ("--baseline", small, "--fail-if", "size>5%", "--any-environment")
    code, out, _ = call(capfd, "bench", models / "c.onnx", *QUICK, *gate)
    assert code == 0
    assert "passed" in out
    code, out, _ = call(capfd, "bench", models / "a.onnx", *QUICK, *gate, "--json")
    assert code == 1
    assert json.loads(out)["gate"]["status"] == "regressed"

    page = tmp_path / "fleet.html"
    code, out, _ = call(capfd, "compare", f"desk={files['json']}", small, "--html", page)
    assert code == 0
    assert "desk" in out
    assert "small" in out
    assert page.is_file()


def test_bundle_runs_on_the_edge(models, capfd, tmp_path):
    """The folder loads in the runtime with the labels and preprocessing given."""
    settings = tmp_path / "p.json"
    settings.write_text('{"scale": 0.5}')
    arguments = ("-o", tmp_path / "b", "--labels", "a,b,c,d", "--preprocessing", settings)
    code, out, _ = call(capfd, "bundle", models / "c.onnx", *arguments)
    assert code == 0
    assert "model.onnx" in out
    edge = EdgeModel(tmp_path / "b")
    edge.self_test()
    assert list(edge.labels) == ["a", "b", "c", "d"]
    code, _, err = call(capfd, "bundle", models / "c.onnx", "-o", tmp_path / "b")
    assert code == 3
    assert "exists already" in err


def test_export_of_a_factory_with_weights(tmp_path):
    """A module of the current folder is built, exported and compared; what it prints stays off stdout."""
    torch = pytest.importorskip("torch")
    (tmp_path / "mine.py").write_text(
        "import torch\ndef net():\n    print('hello from the factory')\n    return torch.nn.Linear(3, 2)\n"
    )
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    arguments = ("--input", "x=1x3", "--dynamic", "x.0=batch", "--exporter", "torchscript", "--json")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = program(
        "export", "mine:net", "-o", "o.onnx", "--weights", "w.pt", *arguments, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["samples"] > 0
    assert "hello from the factory" in done.stderr
    assert (tmp_path / "o.onnx").is_file()


BAD = (
    ("compress {m}/none.onnx -o {t}/o.onnx", 3, "none.onnx: there is no such file"),
    ("compress {m}/text.onnx -o {t}/o.onnx", 3, "text.onnx: "),
    ("compress {m}/half.onnx -o {t}/o.onnx", 3, "half.onnx: "),
    ("compress {m}/empty.onnx -o {t}/o.onnx", 3, "the file is empty"),
    ("compress {m}/folder.onnx -o {t}/o.onnx", 3, "this is a folder"),
    ("compress {m}/a.onnx -o {t}/none/o.onnx", 3, "the output's folder does not exist"),
    ("compress {m}/a.onnx -o {m}/a.onnx", 3, "the output is the input"),
    ("compress {m}/a.onnx -o {t}", 3, "the output is a folder"),
    ("compress {m}/a.onnx -o {t}/o --report {t}/o", 2, "the report is the output"),
    ("compress {m}/a.onnx -o {t}/o --report {t}/none/r.html", 3, "the output's folder does not exist"),
    ("compress {m}/a.onnx", 2, "Missing option '-o'"),
    ("compress {m}/a.onnx -o {t}/o --align some", 2, "none of auto, off or a positive number"),
    ("compress {m}/a.onnx -o {t}/o --align 0", 2, "none of auto, off or a positive number"),
    ("compress {m}/a.onnx -o {t}/o --zero-below 1", 2, "no share of a layer's largest weight"),
    ("compress {m}/a.onnx -o {t}/o --zero-below nan", 2, "no share of a layer's largest weight"),
    ("compress {m}/a.onnx -o {t}/o --target some", 2, "Invalid value for '--target'"),
    ("compress {m}/a.onnx -o {t}/o --partial-residuals some", 2, "Invalid value for '--partial-residuals'"),
    ("inspect {m}/a.onnx --partial-residuals", 2, "requires an argument"),
    ("compress {m}/a.onnx -o {t}/o --unknown", 2, "No such option"),
    ("inspect {m}/none.onnx", 3, "there is no such file"),
    ("inspect {m}/a.onnx --explain nothing", 2, "the model has no such tensor"),
    ("inspect {m}/a.onnx --explain c0:7", 2, "the tensor has 4 axes"),
    ("verify {m}/a.onnx {m}/none.onnx", 3, "there is no such file"),
    ("verify {m}/a.onnx {m}/c.onnx --samples 0", 2, "Invalid value for '--samples'"),
    ("verify {m}/a.onnx {m}/c.onnx --rtol -1", 2, "no tolerance"),
    ("verify {m}/a.onnx {m}/c.onnx --ep nothing", 3, "the execution provider is not available"),
    ("bench {m}/none.onnx", 3, "there is no such file"),
    ("bench {m}/a.onnx --inputs {m}/none.npz", 3, "there is no such file of inputs"),
    ("bench", 2, "Missing argument"),
    ("bench {m}/a.onnx --threads 1,x", 2, "no list of numbers"),
    ("bench {m}/a.onnx --batch 0", 2, "no list of numbers of 1 or more"),
    ("bench {m}/a.onnx --shape x", 2, "no size"),
    ("bench {m}/a.onnx --shape nothing=3", 2, "no model has a dynamic dimension of this name"),
    ("bench {m}/a.onnx --ep nothing", 3, "there is no execution provider of this name"),
    ("bench {m}/a.onnx --fail-if p50>5%", 2, "there is nothing to compare with"),
    ("bench {m}/a.onnx --baseline {m}/list.json", 2, "nothing is asked of the baseline"),
    ("bench {m}/a.onnx --baseline {m}/list.json --fail-if p50>5%", 3, "not a benchmark result"),
    ("bench {m}/a.onnx --html {t}/none/x.html", 3, "the output's folder does not exist"),
    ("bench {m}/a.onnx -o {m}/a.onnx", 3, "the output is the input"),
    ("compare {m}/none.json", 3, "No such file"),
    ("compare {m}/text.onnx", 3, "not JSON"),
    ("bundle {m}/a.onnx -o {t}/none/b", 3, "parent folder does not exist"),
    ("bundle {m}/a.onnx -o {m}", 3, "exists already"),
    ("bundle {m}/a.onnx -o {t}/b --labels a,,b", 2, "a label is empty"),
    ("bundle {m}/a.onnx -o {t}/b --preprocessing {m}/list.json", 2, "not a JSON object"),
    ("export nofactory -o {t}/o.onnx --input x=1x3", 2, "not a factory"),
    ("export a:b -o {t}/o.onnx --input x=0x3", 2, "size 0"),
    ("export a:b -o {t}/o.onnx --input x", 2, "not an input declaration"),
    ("export a:b -o {t}/o.onnx --input x=1x3 --dynamic x=b", 2, "not a dynamic axis"),
    ("export a:b -o {t}/o.onnx --input x=1x3 --dynamic y.0=b", 2, "no input has this axis"),
    ("export a:b -o {t}/o.onnx --input x=1x3 --weights {m}/none.pt", 3, "no such file of weights"),
    ("export a:b -o {t}/none/o.onnx --input x=1x3", 3, "the output's folder does not exist"),
    ("export a:b -o {t}/o.onnx --input x=1x3 --exporter other", 2, "Invalid value for '--exporter'"),
    ("demo -o {m}", 3, "holds something else than a demo's results"),
    ("demo -o {t}/none/demo", 3, "parent folder does not exist"),
    ("frobnicate", 2, "No such command"),
)


@pytest.mark.parametrize(("line", "code", "words"), BAD, ids=[line for line, _, _ in BAD])
def test_bad_input_is_one_line(line, code, words, *, models, capfd, tmp_path):
    """One clear line on stderr, nothing on stdout, nothing written, the documented exit code."""
    arguments = [part.format(m=models, t=tmp_path) for part in line.split()]
    found, out, err = call(capfd, *arguments)
    assert found == code
    assert out == ""
    assert err.startswith("etp-deploy: error: ")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    ["", "--help", "--version", "compress", "compress a.onnx -o b --align x", "nonsense", "demo --seed x"]
    + ["compress none.onnx -o b.onnx", "export a:b -o o --input x", "bench none.onnx --threads 1,2"]
    + [f"{command} --help" for command in COMMANDS],
)
def test_nothing_heavy_loads_for_nothing(line):
    """Help, version, wrong usage and missing files load neither torch nor onnx nor their kin."""
    code = (
        "import sys; from etp_deploy.cli import main; main(sys.argv[1:]); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("[]\n"), done.stderr


def test_help_and_version(capfd):
    """Both go to stdout with exit 0; the bare name shows the help on stderr with exit 2."""
    code, out, _ = call(capfd, "--help")
    assert code == 0
    assert all(f"  {command}" in out for command in COMMANDS)
    code, out, _ = call(capfd, "--version")
    assert code == 0
    assert out.startswith("etp-deploy, version ")
    code, out, err = call(capfd)
    assert (code, out) == (2, "")
    assert "Commands:" in err


def test_unexpected_errors_are_one_line_too(monkeypatch, models, capfd):
    """A defect is one line with exit 3; the variable that it names shows the traceback."""

    def broken(*_arguments, **_options):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("etp_deploy.inspection.inspect", broken)
    code, out, err = call(capfd, "inspect", models / "a.onnx")
    assert (code, out) == (3, "")
    assert "unexpected ZeroDivisionError: division by zero" in err
    assert "ETP_DEPLOY_TRACEBACK=1" in err
    assert err.count("\n") == 1
    monkeypatch.setenv("ETP_DEPLOY_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(models / "a.onnx")])


def test_a_failed_verification_writes_nothing(monkeypatch, models, capfd, tmp_path):
    """When original and result differ the exit code is 1 and there is no file."""
    right = pipeline.verify_models

    def wrong(*arguments, **options):
        return dataclasses.replace(right(*arguments, **options), passed=False, reason="output 'y' differs")

    monkeypatch.setattr(pipeline, "verify_models", wrong)
    code, out, err = call(capfd, "compress", models / "a.onnx", "-o", tmp_path / "o.onnx", *PLAIN, "--json")
    assert (code, out) == (1, "")
    assert "output 'y' differs" in err
    assert list(tmp_path.iterdir()) == []


def test_interruption_is_one_line(monkeypatch, models, capfd):
    """Control-C ends with 130 and a short line."""

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("etp_deploy.inspection.inspect", interrupted)
    code, out, err = call(capfd, "inspect", models / "a.onnx")
    assert (code, out, err) == (130, "", "etp-deploy: interrupted\n")


def test_a_reader_that_leaves_is_no_error(models):
    """When the pipe is closed the program ends quietly."""
    read, write = os.pipe()
    os.close(read)
    command = "import sys; from etp_deploy.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", command, "inspect", models / "a.onnx", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, "Traceback" in done.stderr, "error" in done.stderr) == (141, False, False)


def test_termination_leaves_no_temporary_files(models, tmp_path):
    """A terminated compress leaves its folder as it was."""
    command = "import sys; from etp_deploy.cli import main; sys.exit(main())"
    output = tmp_path / "o.onnx"
    running = subprocess.Popen(
        [sys.executable, "-c", command, "compress", models / "a.onnx", "-o", output],
        stdout=subprocess.DEVNULL,
    )
    while running.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    running.wait(60)
    assert [path for path in tmp_path.iterdir() if path != output] == []


def test_numbers_that_json_has_no_words_for_become_null(capfd):
    """Infinities and NaN, wherever they are nested, are null."""
    emit({"a": [float("inf"), {"b": float("nan")}], "c": (1.5,)})
    assert json.loads(capfd.readouterr().out) == {"a": [None, {"b": None}], "c": [1.5]}


def test_real_inputs_are_what_compress_and_verify_run_on(models, capfd, tmp_path):
    """`--inputs` takes a file as `bench` does; a batch's samples also run alone."""
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).standard_normal((2, 3, 8, 8)))
    out = tmp_path / "o.onnx"
    arguments = ("compress", models / "a.onnx", "-o", out, "--inputs", tmp_path / "in.npz", "--json", *PLAIN)
    code, text, _ = call(capfd, *arguments)
    found = json.loads(text)["verification"]
    assert (code, found["passed"], found["samples"], found["seeds"]) == (0, True, 3, [])
    assert found["shapes"] == [{"x": [2, 3, 8, 8]}, {"x": [1, 3, 8, 8]}]
    pair = ("verify", models / "a.onnx", out, "--inputs", tmp_path / "in.npz")
    assert call(capfd, *pair)[0] == 0
    assert call(capfd, *pair[:2], models / "other.onnx", *pair[3:])[0] == 1


@pytest.mark.parametrize("command", ["compress", "verify"])
def test_real_inputs_that_cannot_be_used_are_refused(models, capfd, tmp_path, command):
    """Other arrays and options that contradict: exit 2; a file that is missing or broken: 3; no output."""
    np.savez(tmp_path / "flat.npz", x=np.zeros((2, 3)))
    out = tmp_path / "o.onnx"
    more = ("-o", out) if command == "compress" else (models / "c.onnx",)
    against = "--no-verify" if command == "compress" else "--shape=batch=2"
    (tmp_path / "torn.npz").write_bytes(b"no archive")
    for extra, expected, what in (
        (("--inputs", tmp_path / "flat.npz"), 2, "holds (2, 3), the model takes"),
        (("--inputs", tmp_path / "flat.npz", against), 2, "error: --"),
        (("--inputs", tmp_path / "none.npz"), 3, "there is no such file of inputs"),
        (("--inputs", tmp_path / "torn.npz"), 3, "cannot read the inputs"),
    ):
        code, text, err = call(capfd, command, models / "a.onnx", *more, *extra)
        assert (code, text, err.count("\n")) == (expected, "", 1)
        assert what in err
    assert not out.exists()


def test_a_model_that_drawn_inputs_do_not_suit_is_not_written(capfd, tmp_path):
    """The refusal names the way out."""
    node = helper.make_node("Gather", ["table", "i"], ["y"])
    far = helper.make_node("Add", ["x", "base"], ["i"])
    graph = helper.make_graph(
        [far, node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [
            numpy_helper.from_array(np.ones((5, 3), np.float32), "table"),
            numpy_helper.from_array(np.array(1000), "base"),
        ],
    )
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]),
        tmp_path / "a.onnx",
    )
    arguments = ("compress", tmp_path / "a.onnx", "-o", tmp_path / "o.onnx", *PLAIN)
    code, _, err = call(capfd, *arguments)
    assert code == 1
    assert "the original does not run" in err
    assert "--inputs" in err
    (tmp_path / "in.json").write_text('{"x": [-1000, -996]}')
    assert call(capfd, *arguments, "--inputs", tmp_path / "in.json")[0] == 0
