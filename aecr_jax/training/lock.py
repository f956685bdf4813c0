"""A lock that lets only one run at a time write to a folder, also among machines that share a file system."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from aecr_jax.errors import UserError

NAME = "lock.json"
# The owner touches the lock file this often. If another machine sees no touch for three periods, it treats the owner as dead.
HEARTBEAT_SECONDS = 5.0


class FolderLock:
    """A context manager that holds `folder/lock.json`, which names the host, the process and the time.

    The file is created atomically. The lock of a dead process is taken over. On the same machine, this happens at once: the process is
    recognized by its number and its start time since boot. From another machine, it happens after watching the file for
    `3 * HEARTBEAT_SECONDS`, because a live owner keeps touching it.

    Args:
      folder: an existing folder.
      say: called with each progress message.

    Raises:
      UserError: another process holds the folder (the message names its host, process and start time), or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None] = print):
        self._path = Path(folder) / NAME
        self._say = say
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._lost = False

    def __enter__(self) -> FolderLock:
        mine = self._path.with_name(f".{NAME}.{self._token}.part")
        try:
            mine.write_text(json.dumps(_this_process() | {"token": self._token}, indent=2) + "\n")
            while not _create(mine, self._path):
                owner = _read(self._path)
                if owner is not None and owner.get("token") == self._token:
                    break  # NFS may report a failure although it has created the link
                if owner is not None and _is_alive(owner, self._path, self._say):
                    raise UserError(
                        f"{self._path.parent} is in use: process {owner.get('pid')} on {owner.get('host')} has been training there since"
                        f" {owner.get('since')}. Wait for it, stop it, or choose another run.workdir; if there is no such process, delete"
                        f" {self._path}"
                    )
                _take_away(self._path, owner)
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error
        finally:
            mine.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def check(self) -> None:
        """Raise UserError if another process has taken over the lock in the meantime, for instance while this one was suspended."""
        if self._lost:
            raise UserError(f"{self._path.parent} has been taken over by another process, which {self._path} describes")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        return (_read(self._path) or {}).get("token") == self._token

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_mine():
                    self._lost = not self._stop.is_set()
                    return
                os.utime(self._path)
            except OSError:  # the file system may become available again
                continue


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(psutil.Process()),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _started(process: psutil.Process) -> float:
    """Return the start time of a process in seconds since boot, which does not change when the system clock is set."""
    return process.create_time() - psutil.boot_time()


def _machine() -> str:
    """Return what identifies the scope of a process number: the host, the boot and, for containers, the process namespace."""
    try:
        space = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        space, boot = "", str(round(psutil.boot_time(), -1))
    return f"{socket.gethostname()} {boot} {space}"


def _create(mine: Path, path: Path) -> bool:
    """Create `path` with the contents of `mine` in one step; return False if it already exists."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(mine.read_text())
        except FileExistsError:
            return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Return the owner that a lock file names: None if the file is gone, an empty dict if it cannot be read or parsed."""
    try:
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any], path: Path, say: Callable[[str], None]) -> bool:
    if owner.get("machine") == _machine():
        try:
            process = psutil.Process(int(owner["pid"]))
            # A process that has ended keeps its number until its parent reads the exit status, which some parents never do.
            ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return not ended and abs(_started(process) - float(owner["started"])) < 1
        except (psutil.Error, KeyError, TypeError, ValueError):
            return False
    say(f"{path} is from another machine ({owner.get('host')}): waiting {3 * HEARTBEAT_SECONDS:.0f} s to see whether its run is active")
    before = _touched(path)
    deadline = time.monotonic() + 3 * HEARTBEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 5)
        if (now := _touched(path)) is None:
            return False
        if now != before:
            return True
    return False


def _touched(path: Path) -> int | None:
    """Return when the file was last touched, in nanoseconds by the clock of its file system, or None if it cannot be opened.

    The file is opened because network file systems cache the result of a plain `stat`.
    """
    try:
        with open(path) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _take_away(path: Path, owner: dict[str, Any] | None) -> None:
    """Remove the lock file of a dead owner; if another process has replaced it in the meantime, put that file back."""
    aside = path.with_name(f".{NAME}.{uuid.uuid4().hex}.part")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != owner:
        _create(aside, path)
    aside.unlink()
