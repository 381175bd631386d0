"""Outputs appear whole or not at all, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from etp_deploy.errors import OutputError
from etp_deploy.files import check_output, whole_file, whole_folder, write_text


def names(folder) -> list[str]:
    """Return what lies in a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir())


def write_half(path: Path) -> None:
    """Begin a file at `path` and fail."""
    path.write_text("half")
    raise ValueError("stop")


def test_a_file_appears_with_its_content(tmp_path):
    """The destination holds what was written, and no temporary file stays."""
    write_text(tmp_path / "a.txt", "hello")
    assert (tmp_path / "a.txt").read_text() == "hello"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    """What was at the destination survives an exception half way."""
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ValueError, match="stop"), whole_file(tmp_path / "a.txt") as temporary:
        write_half(temporary)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, function):
    """An error of the operating system at the flush or the rename is one line, and the old file stays."""
    write_text(tmp_path / "a.txt", "old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if function == "fsync" else (Path, "replace")), full)
    with pytest.raises(OutputError, match="cannot write: No space left on device"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_real_full_disk_is_an_output_error(tmp_path):
    """Writing to a device without space is reported as such."""
    with pytest.raises(OutputError, match="No space left"), whole_file(tmp_path / "a.txt"):
        Path("/dev/full").write_bytes(b"x")
    assert names(tmp_path) == []


def test_a_link_at_the_destination_is_replaced_not_followed(tmp_path):
    """The file a symbolic link points at stays untouched."""
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"


def test_a_new_file_has_the_usual_permissions(tmp_path):
    """The file is as readable as any new file, not private as temporary files are."""
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_impossible_destinations_are_refused(tmp_path):
    """A missing folder, a folder in the file's place, and the input itself."""
    with pytest.raises(OutputError, match="folder does not exist"):
        check_output(tmp_path / "none" / "a.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path)
    source = tmp_path / "a.onnx"
    source.write_bytes(b"x")
    (tmp_path / "same.onnx").symlink_to(source)
    with pytest.raises(OutputError, match="the output is the input"):
        check_output(source, inputs=(source,))
    with pytest.raises(OutputError, match="the output is the input"):
        check_output(tmp_path / "same.onnx", inputs=(source,))


def test_a_folder_appears_whole(tmp_path):
    """A folder is there with everything in it, or not at all."""
    with pytest.raises(ValueError, match="stop"), whole_folder(tmp_path / "out") as temporary:
        write_half(temporary / "a")
    assert names(tmp_path) == []
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("all")
    assert (tmp_path / "out" / "sub" / "a").read_text() == "all"
    assert names(tmp_path) == ["out"]


def test_a_folder_in_use_is_not_replaced(tmp_path):
    """A folder with anything in it stays; an empty one is taken."""
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("x")
    with pytest.raises(OutputError, match="exists already"), whole_folder(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="parent folder"), whole_folder(tmp_path / "none" / "out"):
        pass
