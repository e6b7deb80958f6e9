from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from yolotrt.errors import EngineFileError, InputError, OutputError, WeightsError, YolotrtError
from yolotrt.files import atomic_write, atomic_write_text, require_file


def files(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- require_file ---


def test_a_readable_file_is_returned_as_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.wts").write_text("1")
    monkeypatch.chdir(tmp_path)
    assert require_file(Path("a.wts"), "weights") == Path("a.wts")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "weights {path} does not exist: check the path"),
        ("folder", "weights {path} is a directory: name a file"),
        ("empty", "weights {path} is empty: make or download it again"),
        ("pipe", "weights {path} is not a regular file: copy it to one"),
        ("dangling", "weights {path} does not exist: check the path"),
        ("file/below", "weights {path} does not exist: check the path"),
    ],
)
def test_an_unusable_file_is_named_with_what_to_do(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_text("1")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    with pytest.raises(InputError) as caught:
        require_file(path, "weights")
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "/dev/zero"])
def test_a_name_that_no_regular_file_has_is_an_error_of_ours(name):
    with pytest.raises(InputError, match=r"does not exist|cannot be opened|not a regular file"):
        require_file(Path(name), "weights")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(tmp_path):
    path = tmp_path / "secret"
    path.write_text("1")
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read: check its permissions"):
        require_file(path, "weights")


@pytest.mark.parametrize("error", [EngineFileError, WeightsError])
def test_the_error_class_is_the_callers(tmp_path, error: type[YolotrtError]):
    with pytest.raises(error):
        require_file(tmp_path / "missing", "engine", error)


# --- atomic_write ---


def test_a_file_appears_with_its_content_and_nothing_else(tmp_path):
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"1")
        file.write(b"2")
    assert (tmp_path / "a.bin").read_bytes() == b"12"
    assert files(tmp_path) == ["a.bin"]


def test_missing_folders_are_made(tmp_path):
    atomic_write_text(tmp_path / "a" / "b" / "c.txt", "é")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "é".encode()


def test_the_target_is_untouched_until_the_end(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("problem", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_while_writing_leaves_the_old_file_and_no_temporary(tmp_path, problem, old):
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(type(problem)), atomic_write(path) as file:
        file.write(b"half of the new one")
        raise problem
    assert files(tmp_path) == ([] if old is None else ["a.bin"])
    assert old is None or path.read_bytes() == old


def test_a_full_disk_is_an_output_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OutputError, match=r"cannot write .*a\.bin: No space left on device: choose"),
        atomic_write(path),
    ):
        pass
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["a.bin"]


def test_an_unreplaceable_target_leaves_no_temporary(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="Permission denied"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"1")
    assert files(tmp_path) == []


# Below a file, below /proc and a null byte fail for root too, whom permissions do not stop.
@pytest.mark.parametrize("name", ["file/a.bin", "/proc/nothing/a.bin", "/proc/a.bin", "a\0b", "x" * 300])
def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path, name):
    (tmp_path / "file").write_text("1")
    with pytest.raises(OutputError, match=r"^cannot write .*: choose") as caught, atomic_write(tmp_path / name):
        pytest.fail("the body must not run")
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == ["file"]


def test_a_directory_is_not_replaced(tmp_path):
    with pytest.raises(OutputError, match="it is a directory: name a file"), atomic_write(tmp_path):
        pytest.fail("the body must not run")


def test_a_device_or_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null")):
        with pytest.raises(OutputError, match="it is a device or a pipe: name a file"), atomic_write(path):
            pytest.fail("the body must not run")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("by_link", [False, True])
def test_a_write_protected_file_is_not_replaced(tmp_path, by_link):
    path, link = tmp_path / "a.bin", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o444)
    link.symlink_to(path)
    with pytest.raises(OutputError, match="is write-protected: choose another name"):
        atomic_write_text(link if by_link else path, "new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["a.bin", "link"]


def test_a_symbolic_link_stays_one(tmp_path):
    target, link = tmp_path / "elsewhere" / "a.bin", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert files(tmp_path) == ["elsewhere", "elsewhere/a.bin", "link"]


@pytest.mark.parametrize("name", ["x" * 255, "€" * 85, "😀" * 63])  # file systems allow 255 bytes
def test_the_longest_names_can_be_written(tmp_path, name):
    atomic_write_text(tmp_path / name, "1")
    assert files(tmp_path) == [name]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask_as_for_any_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        atomic_write_text(tmp_path / "a", "1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_the_umask_is_left_as_it_was(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "1")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
