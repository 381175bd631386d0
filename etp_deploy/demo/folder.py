"""The demo's folder: it appears whole, and replaces only what a demo left there before."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import TYPE_CHECKING

from etp_deploy.errors import OutputError
from etp_deploy.files import whole_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = "etp-deploy/demo/1"
MARKER = "demo.json"


def check_folder(path: Path) -> None:
    """Refuse a place that cannot be written, or that holds anything but a demo's results.

    Raises:
        OutputError: with what to do.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(
            "the output's parent folder does not exist", where=str(path), hint="create it first"
        )
    if not os.access(parent, os.W_OK):
        raise OutputError("cannot write there", where=str(parent), hint="choose another output with -o")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError("the output is no folder", where=str(path), hint="choose another name")
    if path.is_dir() and any(path.iterdir()) and not _is_demo(path):
        hint = "choose another name, or remove it"
        raise OutputError("the folder holds something else than a demo's results", where=str(path), hint=hint)


@contextlib.contextmanager
def demo_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, and put it in its place, in that of an earlier demo if need be, when all went well.

    Raises:
        OutputError: when the place cannot be written or holds something else.
    """
    check_folder(path)
    if not path.is_dir():
        with whole_folder(path) as folder:
            yield folder
        return
    fresh, old = (path.absolute().parent / f".{path.name}.{word}-{os.getpid()}" for word in ("new", "old"))
    try:
        with whole_folder(fresh) as folder:
            yield folder
        path.rename(old)
        fresh.rename(path)
    except OSError as error:
        if old.is_dir() and not path.exists():
            old.rename(path)
        raise OutputError(f"cannot write: {error.strerror or error}", where=str(path)) from error
    finally:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)


def _is_demo(path: Path) -> bool:
    try:
        found = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("schema") == SCHEMA
