"""A folder is one live run's: claimed at once, refused to others, free again once its process is dead."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest

from trl_cpo.files import claims
from trl_cpo.files.claims import CLAIM, Claimed, claim, is_claimed
from trl_cpo.files.outputs import claimed, claimed_next, is_taken, next_free

#: Claims a folder, or the next free one, says which, and ends when told to.
HOLD = """
import sys
from trl_cpo.files.outputs import claimed, claimed_next
try:
    with {{"claimed": claimed, "claimed_next": claimed_next}}[sys.argv[1]](sys.argv[2]) as folder:
        print(folder, flush=True)
        {before}
        sys.stdin.readline()
except FileExistsError as error:
    print("refused:", error, flush=True)
"""


@pytest.fixture
def start():
    with ExitStack() as started:

        def start(how, folder, before="pass"):
            process = subprocess.Popen(
                [sys.executable, "-c", HOLD.format(before=before), how, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            return started.enter_context(process)

        yield start


def ended(process):
    process.stdin.close()
    assert process.wait(60) == 0


def test_runs_started_together_get_a_folder_each(tmp_path, start):
    together = [start("claimed_next", tmp_path / "run") for _ in range(6)]
    got = [process.stdout.readline().strip() for process in together]
    assert sorted(got) == sorted([str(tmp_path / "run"), *(str(tmp_path / f"run-{n}") for n in range(2, 7))])
    for process in together:
        ended(process)
    assert list(tmp_path.glob(f"*/{CLAIM}")) == []


def test_of_runs_in_one_folder_one_goes_on(tmp_path, start):
    together = [start("claimed", tmp_path / "run") for _ in range(4)]
    said = [process.stdout.readline().strip() for process in together]
    (holder,) = [process for process, line in zip(together, said, strict=True) if line == str(tmp_path / "run")]
    refused = [line for line in said if line.startswith("refused:")]
    assert len(refused) == 3
    # Those that looked before the note was there do not name the process.
    assert all("in use by another run" in line and f"{tmp_path / 'run'}-2 is free" in line for line in refused)
    with pytest.raises(Claimed, match=f"in use by another run .process {holder.pid} on "), claimed(tmp_path / "run"):
        pass
    assert is_taken(tmp_path / "run") and next_free(tmp_path / "run").name == "run-2"
    for process in together:
        ended(process)
    assert not is_taken(tmp_path / "run")


@pytest.mark.parametrize("children", ["pass", "import os, time; os.fork() or time.sleep(60)"], ids=["alone", "with a child"])
def test_a_killed_runs_claim_is_stale(tmp_path, start, children):
    """Also while a child of it, such as a data loader's worker, still lives."""
    run = start("claimed", tmp_path / "run", children)
    run.stdout.readline()
    assert is_claimed(tmp_path / "run")
    run.send_signal(signal.SIGKILL)
    run.wait(60)
    assert (tmp_path / "run" / CLAIM).exists() and not is_taken(tmp_path / "run")
    with claimed(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / CLAIM).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def test_a_run_of_the_same_process_is_another_run(tmp_path, start):
    with claimed(tmp_path / "run"):
        assert is_claimed(tmp_path / "run")
        with pytest.raises(Claimed, match="another run of this process"), claim(tmp_path / "run"):
            pass
        with claimed_next(tmp_path / "run") as other:
            assert other == tmp_path / "run-2"
        process = start("claimed", tmp_path / "run")
        assert process.stdout.readline().startswith("refused:"), "looking has not let go of it"
        ended(process)


def test_a_lost_lock_frees_no_folder_of_a_live_process(tmp_path, start):
    """Whatever opens and closes the claim within the run, such as an upload of its folder, has the system drop the lock."""
    lose = f"open({str(tmp_path / 'run' / CLAIM)!r}).close()"
    run = start("claimed", tmp_path / "run", lose)
    run.stdout.readline()
    other = start("claimed", tmp_path / "run")
    assert "in use by another run" in other.stdout.readline()
    ended(run)
    ended(other)


@pytest.mark.parametrize(
    "note, lives",
    [
        ({"pid": os.getpid()}, True),
        ({"pid": os.getpid(), "started": "1"}, False),
        ({"pid": 2**31 - 1}, False),
        ({"pid": -1}, False),
        ({"pid": True}, False),
        ({"pid": os.getpid(), "host": "another"}, False),
        ([], False),
    ],
)
def test_without_locks_the_noted_process_decides(tmp_path, monkeypatch, note, lives):
    monkeypatch.setattr(claims, "_lock", lambda descriptor: None)
    if isinstance(note, dict):
        note = {"host": claims.socket.gethostname(), "started": None, **note}
    (tmp_path / CLAIM).write_text(json.dumps(note))
    assert is_claimed(tmp_path) == lives
    if lives:
        with pytest.raises(Claimed), claim(tmp_path):
            pass
    else:
        with claim(tmp_path):
            assert json.loads((tmp_path / CLAIM).read_text())["started"] == claims._started(os.getpid())


@pytest.mark.parametrize("planted", ["link", "hard link", "pipe"])
def test_a_planted_claim_is_never_written_into(tmp_path, planted):
    folder, mine = tmp_path / "run", tmp_path / "mine"
    folder.mkdir()
    mine.write_bytes(b"mine")
    if planted == "pipe":
        os.mkfifo(folder / CLAIM)
    elif planted == "link":
        (folder / CLAIM).symlink_to(mine)
    else:
        os.link(mine, folder / CLAIM)
    assert not is_claimed(folder)
    with claim(folder):
        assert (folder / CLAIM).is_file() and not (folder / CLAIM).is_symlink()
    assert list(folder.iterdir()) == []
    assert mine.read_bytes() == b"mine"


def test_a_place_under_a_file_is_nobodys(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "x", tmp_path / ("long" * 100)):
        assert not is_claimed(folder)
