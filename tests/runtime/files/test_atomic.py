"""Files appear whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from melrt.files.atomic import atomic_write


def write(path: Path, content: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(content)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "x.json"
    write(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write(path, "sec\udc80")
    assert path.read_text() == "first"
    write(path, "second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.json").write_text("old")
    (tmp_path / "link.json").symlink_to("there/x.json")
    write(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "there" / "x.json").read_text() == "new"


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe, "whole")
    reader.join(10)
    assert received == ["whole"]
    assert pipe.is_fifo()
