"""A cache folder that another user wrote, or can write: nothing in it is believed, nothing is written through it."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.data.demo import model as demo
from trl_cpo.data.loading import SourceError, load_pairs
from trl_cpo.engine.reference import table_of
from trl_cpo.engine.reference.store import COLUMNS, ScoreStore
from trl_cpo.files import cache
from trl_cpo.files.cache import ForeignCache, cache_folder

from helpers.tiny import pairs_dataset, training_options

OTHER = 54_321


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRL_CPO_CACHE", str(folder))
    monkeypatch.delenv(cache.TRUSTED_BY, raising=False)
    return folder


@pytest.fixture
def foreign(monkeypatch):
    """Makes files another user's, as far as Python can see: also without the right to give them away."""
    theirs: set[tuple[int, int]] = set()

    def seen(status: os.stat_result) -> os.stat_result:
        if (status.st_dev, status.st_ino) not in theirs:
            return status
        return os.stat_result([*status[:4], OTHER, *status[5:]])

    for name in ("lstat", "fstat"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, own=own, **k: seen(own(*a, **k)))

    def give_away(*paths: Path) -> None:
        for path in paths:
            status = path.lstat()
            theirs.add((status.st_dev, status.st_ino))

    return give_away


def values(fill: float) -> dict:
    return {name: np.full(3, fill).astype(dtype) for name, dtype in COLUMNS.items()}


def test_a_shard_of_another_user_is_scored_again(root, foreign, caplog):
    store = ScoreStore(cache_folder("scores", "key"), [np.arange(3)])
    store.write(0, values(-7))
    assert store.read(0) is not None
    foreign(store.file(0))
    assert store.read(0) is None and "another user" in caplog.text


@pytest.mark.parametrize("how", ["open to everybody", "a link"])
def test_a_shard_that_others_can_change_is_scored_again(root, how):
    store = ScoreStore(cache_folder("scores", "key"), [np.arange(3)])
    store.write(0, values(-7))
    if how == "a link":
        store.file(0).rename(root / "elsewhere")
        store.file(0).symlink_to(root / "elsewhere")
    else:
        store.file(0).chmod(0o666)
    assert store.read(0) is None
    store.write(0, values(-8))
    assert store.read(0)["chosen_logps"][0] == -8
    assert not store.file(0).is_symlink() and not store.file(0).stat().st_mode & stat.S_IWOTH


def trainer(folder, small_model, tokenizer) -> CPOConstrainedTrainer:
    args = CPOConstrainedConfig(**training_options(folder, precompute_ref_log_probs=True), constraint="clip")
    return CPOConstrainedTrainer(model=small_model, args=args, processing_class=tokenizer, train_dataset=pairs_dataset())


def test_a_planted_table_changes_no_training(root, foreign, tmp_path, small_model, tokenizer, caplog):
    """False log-probabilities with a right digest, as another user would leave them."""
    own = table_of(trainer(tmp_path, small_model, tokenizer))
    (file,) = root.glob("scores/*/*.safetensors")
    store = ScoreStore(file.parent, [np.arange(len(own))])
    rows = np.frombuffer(__import__("safetensors.numpy").numpy.load(file.read_bytes())["rows"], dtype="<i8")
    store.shards = [rows]
    store.write(0, {name: np.full(len(own), 5).astype(dtype) for name, dtype in COLUMNS.items()})
    assert table_of(trainer(tmp_path, small_model, tokenizer)).chosen_logps[0] == 5  # it would be believed of this user
    foreign(file)
    again = table_of(trainer(tmp_path, small_model, tokenizer))
    assert np.array_equal(again.chosen_logps, own.chosen_logps) and "another user" in caplog.text


@pytest.mark.parametrize("part", ["scores", "scores/key"])
@pytest.mark.parametrize("how", ["another user's", "open to everybody", "a link", "a file"])
def test_a_foreign_folder_is_refused_and_nothing_is_written_through_it(root, foreign, tmp_path, part, how):
    (root / "scores" / "key").mkdir(parents=True)
    folder, precious = root / part, tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json").write_text("mine")
    match how:
        case "another user's":
            foreign(folder)
        case "open to everybody":
            folder.chmod(0o777)
        case _:
            for each in sorted(folder.rglob("*"), reverse=True):
                each.rmdir()
            folder.rmdir()
            folder.symlink_to(precious) if how == "a link" else folder.write_text("")
            if how == "a link":
                foreign(folder)
    with pytest.raises(ForeignCache, match="TRL_CPO_CACHE to a folder of yours"):
        cache_folder("scores", "key")
    assert [path.name for path in precious.iterdir()] == ["manifest.json"]
    assert (precious / "manifest.json").read_text() == "mine"


def test_an_own_link_to_a_larger_disk_is_followed(root, foreign, tmp_path):
    (tmp_path / "large").mkdir()
    root.mkdir()
    (root / "scores").symlink_to(tmp_path / "large")
    store = ScoreStore(cache_folder("scores", "key"), [np.arange(3)])
    store.write(0, values(-7))
    assert store.read(0) is not None and (tmp_path / "large" / "key").is_dir()
    (tmp_path / "large").chmod(0o777)
    with pytest.raises(ForeignCache, match="written by everybody"):
        cache_folder("scores", "key")


def test_who_trusts_a_shared_cache_says_so(root, foreign, monkeypatch):
    folder = cache_folder("scores", "key")
    store = ScoreStore(folder, [np.arange(3)])
    store.write(0, values(-7))
    foreign(folder, store.file(0))
    monkeypatch.setenv(cache.TRUSTED_BY, "1")
    assert cache_folder("scores", "key") == folder and store.read(0) is not None


def test_own_files_with_another_owners_number_are_own(root, monkeypatch):
    """As on a network disk that gives every file one owner."""
    folder = cache_folder("scores")
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    if os.getuid() != 0:
        assert cache_folder("scores") == folder
    else:  # to root's files everybody trusts
        assert cache.is_own(os.lstat(folder), folder)


def test_new_folders_are_not_open_to_everybody(root):
    before = os.umask(0)
    try:
        folder = cache_folder("scores", "key")
    finally:
        os.umask(before)
    assert not folder.stat().st_mode & stat.S_IWOTH and not folder.parent.stat().st_mode & stat.S_IWOTH


def test_a_link_beside_pairs_is_made_in_an_own_folder_alone(root, foreign, tmp_path):
    file = tmp_path / "q[1].jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"}) + "\n")
    assert len(load_pairs(file)) == 1
    foreign(root / "pairs")
    with pytest.raises(SourceError, match="belongs to another user"):
        load_pairs(file)


def test_a_demo_model_of_another_user_is_refused(root, foreign, monkeypatch, tmp_path):
    source = tmp_path / "source.gguf"
    source.write_bytes(b"weights")
    monkeypatch.setattr(demo, "_source", lambda: source)
    demo.build(root / demo.NAME, source, lambda source, folder: (folder / "model.safetensors").write_bytes(b"1") and None)
    assert demo.demo_model_folder() == root / demo.NAME
    foreign(root / demo.NAME)
    with pytest.raises(ForeignCache, match="belongs to another user"):
        demo.demo_model_folder()
