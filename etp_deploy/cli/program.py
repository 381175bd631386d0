"""The program `etp-deploy`: its commands, and what each way of ending looks like."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from etp_deploy import __version__
from etp_deploy.cli.bench import bench
from etp_deploy.cli.bundle import bundle
from etp_deploy.cli.compare import compare
from etp_deploy.cli.compress import compress
from etp_deploy.cli.demo import demo
from etp_deploy.cli.export import export
from etp_deploy.cli.inspect import inspect
from etp_deploy.cli.terminal import ReaderGoneError
from etp_deploy.cli.verify import verify
from etp_deploy.errors import EtpError

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "etp-deploy"
TRACEBACK = "ETP_DEPLOY_TRACEBACK"
USAGE, UNEXPECTED, INTERRUPTED, READER_GONE, TERMINATED = 2, 3, 130, 141, 143


class _Commands(click.Group):
    """Commands in the order of work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


@click.group(NAME, cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=NAME)
def cli() -> None:
    """Exponential Torque Pruning, deployed: take what pruning left dead out of an ONNX model, exactly.

    Exit codes: 0 done, 1 the answer is no (verification failed, regression found), 2 usage, 3 error.
    """


for _command in (export, compress, inspect, verify, bench, compare, bundle, demo):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; only a defect of ours, asked for, shows its traceback."""
    _end_tidily_when_terminated()
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except click.ClickException as error:
        return _say(_usage_line(error), error.exit_code)
    except EtpError as error:
        return _say(_one_line(str(error)), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"{NAME}: interrupted", err=True)
        return INTERRUPTED
    except (ReaderGoneError, BrokenPipeError):
        _silence_stdout()
        return READER_GONE
    return code


def _run(arguments: list[str]) -> int:
    """Parse and invoke.

    Not through click's own `main`: it ends the process itself when a pipe breaks, with a code that means
    something else here.
    """
    if not arguments:
        click.echo(cli.get_help(click.Context(cli, info_name=NAME, **cli.context_settings)), err=True)
        return USAGE
    try:
        with cli.make_context(NAME, arguments) as context:
            result: Any = cli.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except (EtpError, click.ClickException, click.Abort, ReaderGoneError):
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK) or (isinstance(error, BrokenPipeError) and _only_printing(arguments)):
            raise
        what = _one_line(f"unexpected {type(error).__name__}: {error}")
        return _say(f"{what} (a defect of ours; {TRACEBACK}=1 shows where)", UNEXPECTED)
    return result if isinstance(result, int) else 0


def _only_printing(arguments: list[str]) -> bool:
    """Whether nothing but help or version was asked for, so that only stdout can be the pipe that broke."""
    return not {"-h", "--help", "--version"}.isdisjoint(arguments)


def _usage_line(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else NAME
    where = path.removeprefix(NAME).strip()
    message = _one_line(error.format_message()).rstrip(".")
    return f"{where}: {message} (see '{path} --help')" if where else f"{message} (see '{path} --help')"


def _say(line: str, code: int) -> int:
    click.echo(f"{NAME}: error: {line}", err=True)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _silence_stdout() -> None:
    """Let the interpreter's last flush go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _end_tidily_when_terminated() -> None:
    """Turn a termination into an exception, so that temporary files and worker processes go too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
