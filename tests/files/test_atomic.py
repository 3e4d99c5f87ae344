"""Files written whole or not at all."""

import os
import stat

import pytest

from trl_cpo.files import atomic
from trl_cpo.files.atomic import draft_of, replace_file


def test_the_content_is_on_disk_under_another_name_before_it_takes_the_files_place(tmp_path, monkeypatch):
    file, steps = tmp_path / "f.json", []
    file.write_bytes(b"old")
    sync, rename = os.fsync, os.replace

    def synced(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "draft")
        assert file.read_bytes() == (b"new" if steps[-1] == "folder" else b"old")
        sync(descriptor)

    def renamed(draft, target):
        steps.append("rename")
        assert draft_of(draft.name) == "f.json" and draft.read_bytes() == b"new" and target == file
        rename(draft, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    replace_file(file, b"new")
    assert steps == ["draft", "rename", "folder"]
    assert file.read_bytes() == b"new" and [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_step_leaves_what_was_there_and_no_draft(tmp_path, monkeypatch, step):
    file = tmp_path / "f"
    file.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(file, b"new")
    assert file.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("planted", ["file", "link", "dangling"])
def test_a_draft_is_made_here_or_not_at_all(tmp_path, monkeypatch, planted):
    """Whoever may write into the folder cannot have the content written elsewhere, even by guessing the draft's name."""
    folder, mine = tmp_path / "folder", tmp_path / "mine"
    folder.mkdir()
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "0" * 8)
    draft = folder / f".f.{os.getpid()}-00000000.tmp"
    if planted == "file":
        draft.write_bytes(b"mine")
    else:
        draft.symlink_to(mine)
        if planted == "link":
            mine.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        replace_file(folder / "f", b"new")
    assert draft.is_symlink() == (planted != "file") and (planted != "file" or draft.read_bytes() == b"mine")
    assert not (folder / "f").exists() and mine.exists() == (planted == "link")
    assert planted != "link" or mine.read_bytes() == b"mine"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "f").symlink_to(tmp_path / "mine")
    replace_file(tmp_path / "f", b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine" and (tmp_path / "f").read_bytes() == b"new"


def test_the_file_has_the_mode_that_any_new_file_has(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "f", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["f", ".f", ".f.tmp", ".f.1.tmp", ".f.1-zzzzzzzz.tmp", "f.1-00000000.tmp", ".1-00000000.tmp"])
def test_other_names_are_no_drafts(name):
    assert draft_of(name) is None
