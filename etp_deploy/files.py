"""Outputs that appear whole or not at all.

Everything is written under a temporary name in the destination's own folder, flushed to the disk and renamed
into place: a full disk, a kill or an error leaves what was there before. Symbolic links at the destination
are replaced, never followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from etp_deploy.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

# what a caller's block may meet that says something of the destination, and not of what the caller reads
_OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO})


def check_output(path: Path, *, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse a destination whose folder is missing, that is a folder, or that is one of the inputs.

    Raises:
        OutputError: with the path and what to do.
    """
    if not path.parent.is_dir():
        raise OutputError("the output's folder does not exist", where=str(path), hint="create it first")
    if path.is_dir():
        raise OutputError("the output is a folder", where=str(path), hint="name a file")
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError("the output is the input", where=str(path), hint="choose another output name")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends without an error.

    Raises:
        OutputError: when the file cannot be written.
    """
    check_output(path)
    with _translated(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with _translated(path, only=_OF_WRITING):
            yield temporary
        with _translated(path):
            _flush(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _translated(path: Path, *, only: frozenset[int] | None = None) -> Iterator[None]:
    """Turn what the operating system says of a destination into an error of ours; of these kinds only."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise OutputError(f"cannot write: {error.strerror or error}", where=str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Raises:
        OutputError: when the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it into place when the block ends without an error.

    Raises:
        OutputError: when the destination exists and is not an empty folder, or cannot be written.
    """
    if not path.parent.is_dir():
        raise OutputError(
            "the output's parent folder does not exist", where=str(path), hint="create it first"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(
            "the output folder exists already", where=str(path), hint="remove it or choose another name"
        )
    with _translated(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        with _translated(path, only=_OF_WRITING):
            yield temporary
        with _translated(path):
            for file in temporary.rglob("*"):
                _flush(file)
            temporary.chmod(0o777 & ~_umask())
            temporary.replace(path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
