"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import pytest

from melrt.errors import ConfigError
from melrt.files.atomic import atomic_folder, atomic_write, check_writable, user_cache


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


def test_errors_name_the_path_of_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to("/proc/x.json")
    for path in (tmp_path / "folder", tmp_path / "file" / "x.json", Path("/proc/deep/x.json"), tmp_path / "link.json"):
        with pytest.raises(OSError, match=r"\[Errno") as failed:
            write(path, "x")
        assert failed.value.filename == str(path)
    with pytest.raises(OSError, match=r"\[Errno") as failed, atomic_folder(Path("/proc/x.melrt")):
        pass
    assert failed.value.filename == "/proc/x.melrt"
    for full in (OSError(errno.ENOSPC, "No space left on device"), OSError("720 requested and 0 written")):  # by Python, and by numpy
        with pytest.raises(OSError, match=r"x\.npy") as failed, atomic_write(tmp_path / "x.npy"):
            raise full
        assert failed.value.strerror in str(full)
    with pytest.raises(FileNotFoundError, match=r"other\.wav"), atomic_write(tmp_path / "x.npy"):
        (tmp_path / "other.wav").read_bytes()


def test_only_what_killed_processes_left_of_a_path_is_removed(tmp_path: Path) -> None:
    left = [".x-0123abcd.json", ".x.json-0123abcd", ".x.json-0123abcd-old"]
    others = [".y-0123abcd.json", ".x-0123abc.json", "x-0123abcd.json"]
    for name in (*left[:1], *others):
        (tmp_path / name).touch()
    for name in left[1:]:
        (tmp_path / name).mkdir()
    live = atomic_write(tmp_path / "live.json")
    live.__enter__().touch()  # another writer: nothing is removed
    write(tmp_path / "x.json", "1")
    assert {path.name for path in tmp_path.iterdir()} > {*left, *others, "x.json"}
    live.__exit__(None, None, None)
    write(tmp_path / "x.json", "2")
    assert {path.name for path in tmp_path.iterdir()} == {*left[1:], *others, "x.json", "live.json"}
    (tmp_path / "x.json").unlink()
    with atomic_folder(tmp_path / "x.json") as folder:
        (folder / "a").touch()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "x.json", "live.json"}


def test_unwritable_places_are_found_early(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in ("new", "file", "pipe", "deep/new/x.npy"):
        check_writable(tmp_path / path)
    for path in ("folder", "deep/new"):
        check_writable(tmp_path / path, folder=True)
    cases = {
        tmp_path / "folder": "is a folder. Give the name of a file", tmp_path / "file" / "x.npy": "file is not a folder",
        Path("/proc/x.npy"): "new files in /proc are not possible",
    }  # fmt: skip
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=f"^{path} .*{message}"):
            check_writable(path)
    with pytest.raises(ConfigError, match="file is not a folder"):
        check_writable(tmp_path / "file", folder=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_replaced_folder_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed between two renames would leave nothing under the folder's name."""
    path = tmp_path / "x"
    seen = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        result = rename(self, target)
        seen.append((path / "a").read_text() if path.exists() else None)
        return result

    for content in "12":
        with atomic_folder(path) as folder:
            (folder / "a").write_text(content)
            monkeypatch.setattr(Path, "rename", watched)
    assert seen == ["1", "2"]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    monkeypatch.setattr("melrt.files.atomic._exchange", lambda one, other: False)  # a file system that cannot exchange folders
    with atomic_folder(path) as folder:
        (folder / "a").write_text("3")
    assert seen == ["1", "2", None, "3"]


@pytest.mark.skipif(sys.platform == "win32", reason="temporary files of Windows are the user's own")
def test_cache_of_a_user_without_a_home_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user can make the folder first, or a link, and would receive or exchange what is written."""
    for name in ("MELRT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    cache = user_cache()
    assert cache == user_cache() == tmp_path / f"melrt-{os.getuid()}"
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    with pytest.raises(ConfigError, match="not a folder that only this user can write to.*MELRT_CACHE"):
        user_cache()
    cache.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="MELRT_CACHE"):
        user_cache()
