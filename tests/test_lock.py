"""The lock on a run's folder: who holds it, how a dead owner is detected, and what happens to two runs at once."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_commands import fails

from aecr_jax import UserError
from aecr_jax.training import lock
from aecr_jax.training.lock import FolderLock

_HOLD = """
import sys
from aecr_jax.errors import UserError
from aecr_jax.training.lock import FolderLock
print("ready", flush=True)
sys.stdin.readline()
try:
    with FolderLock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print("refused", error, flush=True)
"""


@contextlib.contextmanager
def holders(folder, count):
    """Start processes that take the lock when they read a line, print "held" or "refused", and release it at the next line."""
    command = [sys.executable, "-c", _HOLD, folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes)) for _ in range(count)]
        for process in started:
            assert process.stdout.readline() == "ready\n"
        for process in started:
            process.stdin.write("\n")
        yield started


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)


def other_machine(folder, **changes):
    """Write a lock file as a process on another host does."""
    owner = {"host": "elsewhere", "pid": os.getpid(), "started": 0.0, "machine": "elsewhere", "since": "then", "token": "x"} | changes
    (folder / "lock.json").write_text(json.dumps(owner))


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    with FolderLock(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
        process = f"process {os.getpid()} on {owner['host']}"
        with pytest.raises(UserError, match=f"{tmp_path} is in use: {process} has been training there since"):
            FolderLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path):
        pass


def test_a_second_run_in_one_folder_is_refused(config_file, tmp_path, capsys):
    with FolderLock(tmp_path):
        said = fails(capsys, "train", "--config", config_file, "--run.workdir", tmp_path, "--loss.cr", "0")
    assert "is in use: process" in said and "choose another run.workdir" in said
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "config.json").exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    with holders(tmp_path, 1) as (process,):
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            FolderLock(tmp_path).__enter__()
        process.kill()
        process.wait()
        with FolderLock(tmp_path):
            pass


def test_the_lock_of_a_killed_process_is_taken_over_before_its_parent_asks_for_its_exit_status(tmp_path):
    """The first process of a container may never collect exit statuses, so a killed process stays in the process table as a zombie."""
    with holders(tmp_path, 1) as (process,):
        assert process.stdout.readline() == "held\n"
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:  # a zombie waits for its parent
            time.sleep(0.01)
        with FolderLock(tmp_path):
            pass


def test_a_change_of_the_system_clock_makes_no_owner_dead(tmp_path, monkeypatch):
    """psutil computes start times from the time of the boot, which moves when the clock is set, and the ticks since then."""
    clock = psutil._psplatform
    booted = clock.boot_time()
    with FolderLock(tmp_path):
        monkeypatch.setattr(clock, "boot_time", lambda: booted + 3600)
        with pytest.raises(UserError, match="is in use"):
            FolderLock(tmp_path).__enter__()


def test_a_process_number_that_was_given_again_is_no_owner(tmp_path):
    """This process has the number of the dead owner, but started later."""
    with FolderLock(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(owner | {"started": owner["started"] - 100}))
    with FolderLock(tmp_path):
        pass


def test_another_machine_that_touches_its_lock_is_alive(tmp_path, quick):
    other_machine(tmp_path)
    stop = threading.Event()

    def touch():
        while not stop.wait(0.05):
            os.utime(tmp_path / "lock.json")

    thread = threading.Thread(target=touch)
    thread.start()
    said = []
    with pytest.raises(UserError, match=r"process .* on elsewhere has been training there since then"):
        FolderLock(tmp_path, said.append).__enter__()
    stop.set()
    thread.join()
    assert "is from another machine (elsewhere)" in said[0]
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "x"


def unavailable(monkeypatch, where, name):
    """Make a function fail as it would on a network file system whose server does not answer, and return the list of its calls."""
    calls = []

    def fail(path):
        calls.append(path)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(where, name, fail, raising=False)
    return calls


def wait(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_owner_that_cannot_read_its_lock_keeps_it(tmp_path, quick, monkeypatch):
    """The file system may become available again, as it does here."""
    with FolderLock(tmp_path) as held:
        with monkeypatch.context() as context:
            calls = unavailable(context, Path, "read_bytes")
            wait(lambda: len(calls) > 2)
        before = os.stat(tmp_path / "lock.json").st_mtime_ns
        wait(lambda: os.stat(tmp_path / "lock.json").st_mtime_ns != before)  # it is touched again
        held.check()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_watched_is_not_taken_over(tmp_path, quick, monkeypatch):
    other_machine(tmp_path)
    calls = unavailable(monkeypatch, lock, "open")
    with pytest.raises(UserError, match=r"process .* on elsewhere has been training there since then"):
        FolderLock(tmp_path, lambda line: None).__enter__()
    assert len(calls) > 3 and json.loads((tmp_path / "lock.json").read_text())["token"] == "x"


@pytest.mark.parametrize("damaged", [False, True])
def test_another_machine_that_does_not_is_dead(tmp_path, quick, damaged):
    other_machine(tmp_path)
    if damaged:
        (tmp_path / "lock.json").write_bytes(b"")
    with FolderLock(tmp_path, lambda _: None):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_an_owner_that_lost_its_lock_is_told_and_leaves_the_new_one(tmp_path, quick):
    with FolderLock(tmp_path) as held:
        held.check()
        other_machine(tmp_path)
        time.sleep(0.5)
        with pytest.raises(UserError, match="has been taken over by another process"):
            held.check()
    assert (tmp_path / "lock.json").exists()


def test_of_several_that_find_a_dead_owner_one_gets_the_lock(tmp_path):
    with FolderLock(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(owner | {"pid": 2**22 + 1}))  # above the largest process number of Linux
    with holders(tmp_path, 3) as processes:
        said = sorted(process.stdout.readline().split()[0] for process in processes)
    assert said == ["held", "refused", "refused"]
