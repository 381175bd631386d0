"""Native passes in their own process: what they return, how they die, what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from etp_deploy import errors
from etp_deploy.worker import isolated


def test_returns_the_value_of_the_function():
    """Arguments go in and the result comes back unchanged."""
    assert isolated("operator:add", [1, 2], [3.5]) == [1, 2, 3.5]


def test_keyword_arguments_reach_the_function():
    """Keyword arguments that are not limits belong to the function."""
    assert isolated("builtins:dict", a=1) == {"a": 1}


@pytest.mark.parametrize("name", ["SIGFPE", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL"])
def test_a_crash_is_one_clear_line(name):
    """A child that dies of a signal becomes a ModelError that names the signal."""
    with pytest.raises(
        errors.ModelError, match=f"^the native pass raise_signal crashed with {name}"
    ) as caught:
        isolated("signal:raise_signal", getattr(signal, name))
    assert "\n" not in str(caught.value)


def test_a_hang_is_ended():
    """A child past its time is killed and reported."""
    with pytest.raises(errors.ModelError, match=r"sleep did not finish within 0\.5 s"):
        isolated("time:sleep", 600, timeout_s=0.5)


def test_no_process_is_left_behind():
    """After a hang neither the child nor its own children survive, nor does a zombie."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(errors.ModelError):
        isolated("subprocess:run", ["sleep", "600.25"], timeout_s=1.5)
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before
    deadline = time.monotonic() + 10
    while _sleepers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _sleepers()


def _sleepers() -> list[int]:
    found = psutil.process_iter(["pid", "cmdline", "status"])
    return [
        p.info["pid"]
        for p in found
        if p.info["cmdline"] == ["sleep", "600.25"] and p.info["status"] != "zombie"
    ]


@pytest.mark.parametrize("kind", [errors.EtpError, errors.VerificationError, errors.BundleError])
def test_our_errors_arrive_unchanged(kind, tmp_path, monkeypatch):
    """Kind, message, place and hint of an EtpError raised in the child are those caught in the parent."""
    (tmp_path / "raises_ours.py").write_text(
        f"from etp_deploy.errors import {kind.__name__} as Kind\n"
        "def go():\n    raise Kind('m', where='w', hint='h')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(kind) as caught:
        isolated("raises_ours:go")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.where, caught.value.hint) == ("m", "w", "h")


def test_any_other_exception_is_one_line_with_its_kind():
    """An exception that is not ours becomes a ModelError with its kind and first line."""
    with pytest.raises(errors.ModelError, match="the native pass loads failed: JSONDecodeError") as caught:
        isolated("json:loads", "{")
    assert "\n" not in str(caught.value)


def test_a_result_that_cannot_be_pickled_is_an_error():
    """A function whose result does not cross processes is reported as such."""
    with pytest.raises(errors.ModelError, match="cannot be passed on"):
        isolated("threading:Lock")


def test_an_exit_without_an_answer_is_an_error():
    """A pass that ends the process itself, even with status 0, is not taken for a success."""
    with pytest.raises(errors.ModelError, match="without an answer"):
        isolated("os:_exit", 0)
    with pytest.raises(errors.ModelError, match="exit status 7"):
        isolated("os:_exit", 7)


@pytest.mark.skipif(sys.platform != "linux", reason="address-space limits are enforced on Linux")
def test_memory_is_limited():
    """An allocation past the limit fails in the child and is named."""
    with pytest.raises(errors.ModelError, match="out of memory"):
        isolated("builtins:bytes", 4 << 30, memory_bytes=1 << 30)


@pytest.mark.skipif(sys.platform != "linux", reason="processor-time limits are POSIX")
def test_processor_time_is_limited():
    """A child that computes for too long is ended by its processor-time limit."""
    with pytest.raises(errors.ModelError, match="processor time"):
        isolated("builtins:sum", range(10**12), cpu_s=1, timeout_s=60)


def test_what_the_child_prints_stays_out_of_our_stdout(capfd):
    """A pass that prints does not disturb data on stdout, nor prose on stderr."""
    isolated("builtins:print", "chatter")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_modules_in_the_current_folder_are_not_imported(tmp_path):
    """A file named like a library in the folder where the command runs cannot take its place."""
    (tmp_path / "onnx.py").write_text("raise SystemExit('hijacked')\n")
    code = "import sys; sys.path = [p for p in sys.path if p]; from etp_deploy.worker import isolated as i\n"
    code += "i('onnx:load_from_string', b'')"
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        check=False,
    )
    assert b"hijacked" not in done.stderr


def test_importing_the_module_is_cheap():
    """Importing the worker loads no native library."""
    heavy = "{'numpy', 'onnx', 'onnxruntime', 'torch'}"
    code = f"import sys, etp_deploy.worker; print(list({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
