"""Messages of disks and folders that cannot be written, and the last parts of paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modules import files
from modules.errors import ResourceError
from modules.files import check_folder_unwritten, disk_errors, last_part, make_writable_folder


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (OSError("odd"), "odd")],
)
def test_a_disk_error_is_a_message_with_what_to_do(error: OSError, reason: str) -> None:
    with pytest.raises(ResourceError) as caught, disk_errors(Path("a/b"), "go on"):
        raise error
    assert str(caught.value).endswith(
        f" cannot be written: {reason}. Free some space or check the folder, then go on."
    )
    assert caught.value.exit_code == 5
    with pytest.raises(ResourceError) as caught, disk_errors(Path("a/b"), what="--output_dir"):
        raise error
    assert str(caught.value) == f"--output_dir {Path('a/b')} cannot be written: {reason}"


def test_a_folder_is_made_and_left_empty_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new/newer"
    make_writable_folder(folder, "--output_dir")
    assert not list(folder.iterdir())
    (tmp_path / "file").write_bytes(b"")
    for below in ("file", "file/newer"):
        with pytest.raises(ResourceError, match=r"--output_dir .*file.*: .*file is a file; name a folder"):
            make_writable_folder(tmp_path / below, "--output_dir")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"--output_dir .*newer cannot be written: No space left"):
        make_writable_folder(folder, "--output_dir")
    assert not list(folder.iterdir())


def test_a_folder_is_checked_without_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder_unwritten(tmp_path / "new/newer", "--output_dir")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match=r"--output_dir .*newer: .*file is a file; name a folder"):
        check_folder_unwritten(tmp_path / "file/newer", "--output_dir")
    monkeypatch.setattr(files.os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK))
    with pytest.raises(ResourceError, match=r"the output folder .*new: .* cannot be written"):
        check_folder_unwritten(tmp_path / "new", "the output folder")


@pytest.mark.parametrize(
    "path", ["C:\\models\\a b.safetensors", "/models/a b.safetensors", "a b.safetensors"]
)
def test_the_last_part_of_a_path_tells_no_folder_of_either_system(path: str) -> None:
    assert last_part(Path(path)) == "a b.safetensors"
    assert last_part(Path(f"{path}\\")) == "a b.safetensors"
