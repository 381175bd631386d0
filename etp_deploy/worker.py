"""Native passes in a process of their own, so that what crashes or hangs there is an error here.

The ONNX checker, shape inference, onnxsim and ONNX Runtime can divide by zero, overflow the stack, touch a
file that shrank, or never return. `isolated` runs such a pass in a fresh interpreter (no fork: a forked child
inherits locks of native thread pools) under limits and turns every way of dying into one line.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from etp_deploy.errors import EtpError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_TIMEOUT_S = 600.0


def isolated(
    target: str,
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    memory_bytes: int | None = None,
    cpu_s: int | None = None,
    **kwargs: Any,
) -> Any:
    """Call a function in a fresh child process and return what it returns.

    Args:
        target: what to call, as "package.module:function".
        args: its positional arguments; they and the result must be picklable.
        timeout_s: wall-clock seconds after which the child and its descendants are killed.
        memory_bytes: limit on the child's address space, None for no limit.
        cpu_s: limit on the child's processor time in seconds, None for no limit.
        kwargs: the function's keyword arguments.

    Raises:
        EtpError: the very error that the function raised, kind, message, place and hint unchanged.
        ModelError: when the child crashed, ran past a limit, or raised anything else.
    """
    with Waiting(target) as child:
        limits = {"timeout_s": timeout_s, "memory_bytes": memory_bytes, "cpu_s": cpu_s}
        return child.call(*args, limits=limits, **kwargs)


class Waiting:
    """A child process that waits for its one call, with what the call needs imported in the meantime.

    Args:
        target: what it will call, as "package.module:function".
        preload: modules to import while it waits; one that cannot be imported is left to the call.
    """

    def __init__(self, target: str, *, preload: tuple[str, ...] = ()) -> None:
        self._target = target
        self._folder = tempfile.TemporaryDirectory(prefix="etp-deploy-")
        self._request, self._response, self._log = (
            Path(self._folder.name, name) for name in ("request", "response", "log")
        )
        # Safe path (-P) keeps modules lying in the current folder out; the parent's path is what it imports from.
        path = os.pathsep.join(str(Path(entry).resolve()) if entry else str(Path.cwd()) for entry in sys.path)
        places = [str(self._request), str(self._response), str(os.getpid())]
        with self._log.open("wb") as sink:
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
                [sys.executable, "-P", "-m", "etp_deploy.worker", *places, *preload],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        """Return the waiting child."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child, whatever it is doing, and all that it started."""
        # Also reached on Ctrl-C: the child left our session, so nobody else would end it. While it has not
        # been waited for its group still exists and its number cannot belong to someone else.
        if self._child.returncode is None:
            _kill_group(self._child)
        self._child.wait()
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._folder.cleanup()

    def call(self, *args: Any, limits: Mapping[str, Any], **kwargs: Any) -> Any:
        """Make the call, once; see `isolated` for what it raises.

        Args:
            args: positional arguments.
            limits: `timeout_s`, and if wanted `memory_bytes` and `cpu_s`.
            kwargs: keyword arguments.
        """
        request = (self._target, args, kwargs, limits.get("memory_bytes"), limits.get("cpu_s"))
        self._request.write_bytes(pickle.dumps(request))
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a child that died says so by its exit status
            self._child.stdin.write(b"go\n")
            self._child.stdin.flush()
        name = self._target.rpartition(":")[2].lstrip("_")
        try:
            status = self._child.wait(limits["timeout_s"])
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"the native pass {name} did not finish within {limits['timeout_s']:g} s",
                hint="the model may hold an endless loop or be too large",
            ) from error
        if status == 0 and self._response.exists():
            return _answer(name, pickle.loads(self._response.read_bytes()))  # noqa: S301 - our own child's answer
        raise ModelError(f"the native pass {name} {_death(status)}", hint=_last_line(self._log))


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()


def _answer(name: str, answer: tuple[Any, ...]) -> Any:
    kind, *rest = answer
    if kind == "value":
        return rest[0]
    if kind == "error":
        error, message, where, hint = rest
        raise error(message, where=where, hint=hint)
    raise ModelError(f"the native pass {name} failed: {rest[0]}")


def _death(status: int) -> str:
    """Say in words how a child with this exit status ended."""
    if status == 0:
        return "ended without an answer"
    if status > 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if name == "SIGKILL":
        return "was killed (SIGKILL), most likely because memory ran out"
    if name == "SIGXCPU":
        return "used up its processor time (SIGXCPU)"
    return f"crashed with {name}"


def _last_line(log: Path) -> str:
    """Return what the child said last, shortened; empty when it said nothing."""
    lines = log.read_bytes()[-4096:].decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f"its last words: {said[-1][:200]}" if said else ""


def _main(request: Path, response: Path, parent: int, preload: list[str]) -> None:
    """Import what is named, wait for a line, answer one request; what the child process runs."""
    for module in preload:
        with contextlib.suppress(Exception):  # the call itself will say what is wrong
            importlib.import_module(module)
    if not sys.stdin.readline():
        return
    target, args, kwargs, memory_bytes, cpu_s = pickle.loads(request.read_bytes())  # noqa: S301 - our parent's
    _limit(memory_bytes, cpu_s)
    _die_with(parent)
    answer = _call(target, args, kwargs)
    try:
        data = pickle.dumps(answer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        data = pickle.dumps(("failure", f"its result cannot be passed on: {error}"))
    response.write_bytes(data)


def _call(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    module, _, name = target.partition(":")
    try:
        return "value", getattr(importlib.import_module(module), name)(*args, **kwargs)
    except EtpError as error:
        # Field by field: an exception with keyword-only arguments does not survive pickling.
        return "error", type(error), error.message, error.where, error.hint
    except MemoryError:
        return "failure", "it ran out of memory"
    except Exception as error:  # noqa: BLE001 - the boundary: whatever native code raises becomes one line
        return "failure", first_line(error)


def first_line(error: BaseException) -> str:
    """Return an exception's kind and the first line of its message, shortened, for use within one line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _limit(memory_bytes: int | None, cpu_s: int | None) -> None:
    try:
        import resource  # noqa: PLC0415 - POSIX only
    except ImportError:
        return
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: cpu_s}
    for kind, value in limits.items():
        if value is not None:
            hard = resource.getrlimit(kind)[1]
            wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (wanted, hard))


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies: a killed parent leaves no endless child."""
    if sys.platform != "linux":
        return
    import ctypes  # noqa: PLC0415 - only the child needs it

    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
