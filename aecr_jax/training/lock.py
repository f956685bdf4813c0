"""A lock that lets only one run at a time write to a folder, also among machines that share a file system or object storage."""

from __future__ import annotations

import contextlib
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
from aecr_jax.storage import GuardedObject, as_path, explain, is_remote, writing

NAME = "lock.json"
# The owner touches the lock file this often. If another machine sees no touch for three periods, it treats the owner as dead.
HEARTBEAT_SECONDS = 5.0
# The same for a lock in object storage, where each touch is an upload that costs money.
OBJECT_HEARTBEAT_SECONDS = 20.0


class FolderLock:
    """A context manager that holds `folder/lock.json`, which names the host, the process and the time.

    The file is created atomically. The lock of a dead process is taken over. On the same machine, this happens at once: the process is
    recognized by its number and its start time since boot. From another machine, it happens after watching the file for
    `3 * HEARTBEAT_SECONDS`, because a live owner keeps touching it. In object storage, the file is an object, which is written and deleted
    on condition of its generation, and the period is `OBJECT_HEARTBEAT_SECONDS`.

    Args:
      folder: an existing folder, or an address in object storage.
      say: called with each progress message.

    Raises:
      UserError: another process holds the folder (the message names its host, process and start time), or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None] = print):
        self._path = as_path(folder) / NAME
        self._say = say
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._lost = False

    def __enter__(self) -> FolderLock:
        with writing(self._path):
            content = json.dumps(_this_process() | {"token": self._token}, indent=2) + "\n"
            self._file: _File | _Object = (_Object if is_remote(self._path) else _File)(self._path, self._token, content)
            while not self._file.create():
                owner = self._file.read()
                if owner is not None and owner.get("token") == self._token:
                    break  # NFS may report a failure although it has created the link, and so may an upload that was repeated
                if owner is not None and _is_alive(owner, self._file, self._say):
                    raise UserError(
                        f"{self._path.parent} is in use: process {owner.get('pid')} on {owner.get('host')} has been training there since"
                        f" {owner.get('since')}. Wait for it, stop it, or choose another run.workdir; if there is no such process, delete"
                        f" {self._path}"
                    )
                self._file.take_away(owner)
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()
        return self

    def check(self) -> None:
        """Raise UserError if another process has taken over the lock in the meantime, for instance while this one was suspended."""
        if self._lost:
            raise UserError(f"{self._path.parent} has been taken over by another process, which {self._path} describes")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._beats.join(self._file.heartbeat)  # it may be writing
        self._file.release()

    def _beat(self) -> None:
        while not self._stop.wait(self._file.heartbeat):
            try:
                if not self._file.touch():
                    self._lost = not self._stop.is_set()
                    return
            except Exception as error:
                if not isinstance(error, OSError) and explain(error) is None:
                    raise
                continue  # the file system or the network may become available again


class _File:
    """The lock as a file: created as a hard link, so that it appears with its content, and kept alive by its modification time."""

    def __init__(self, path: Path, token: str, content: str):
        self.path, self._token, self._content = path, token, content

    @property
    def heartbeat(self) -> float:
        """Seconds between touches."""
        return HEARTBEAT_SECONDS

    def create(self) -> bool:
        """Create the file in one step; return False if it already exists."""
        mine = self.path.with_name(f".{NAME}.{self._token}.part")
        try:
            mine.write_text(self._content)
            return _create(mine, self.path)
        finally:
            mine.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """Return the owner as `_read` does."""
        return _read(self.path)

    def touch(self) -> bool:
        """Show that the owner is alive; return False if it no longer holds the lock."""
        if not self._is_mine():
            return False
        os.utime(self.path)
        return True

    def touched(self) -> int | None:
        """Return a number that changes with each touch, or None if there is no lock."""
        return _touched(self.path)

    def take_away(self, owner: dict[str, Any] | None) -> None:
        """Remove the lock of a dead owner, unless another process has replaced it since `read` returned that owner."""
        _take_away(self.path, owner)

    def release(self) -> None:
        """Remove the lock if it still is this one; one that cannot be read stays, and is taken over later."""
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        return (_read(self.path) or {}).get("token") == self._token


class _Object:
    """The lock as an object, with the methods of `_File`: its generation changes each time that the owner writes it again."""

    def __init__(self, path: Path, token: str, content: str):
        self.path, self._token, self._content = path, token, content
        self._object = GuardedObject(path)
        self._mine = self._seen = 0  # generations

    @property
    def heartbeat(self) -> float:
        """Seconds between touches."""
        return OBJECT_HEARTBEAT_SECONDS

    def create(self) -> bool:
        return self._write(0)

    def read(self) -> dict[str, Any] | None:
        content, self._seen = self._object.read()
        if not self._seen:
            return None
        owner = _parse(content)
        if owner.get("token") == self._token:
            self._mine = self._seen
        return owner

    def touch(self) -> bool:
        # An upload that was repeated because its answer was lost fails, although the object is this one.
        return self._write(self._mine) or (self.read() or {}).get("token") == self._token

    def touched(self) -> int | None:
        return self._object.generation() or None

    def take_away(self, owner: dict[str, Any] | None) -> None:
        self._object.delete(self._seen)

    def release(self) -> None:
        self._object.delete(self._mine)

    def _write(self, generation: int) -> bool:
        written = self._object.write(self._content, generation)
        self._mine = self._mine if written is None else written
        return written is not None


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
    """Return the owner that a lock file names: None if the file is gone, an empty dict if it cannot be parsed."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any], file: _File | _Object, say: Callable[[str], None]) -> bool:
    if owner.get("machine") == _machine():
        try:
            process = psutil.Process(int(owner["pid"]))
            # A process that has ended keeps its number until its parent reads the exit status, which some parents never do.
            ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return not ended and abs(_started(process) - float(owner["started"])) < 1
        except (psutil.Error, KeyError, TypeError, ValueError):
            return False
    period = 3 * file.heartbeat
    say(f"{file.path} is from another machine ({owner.get('host')}): waiting {period:.0f} s to see whether its run is active")
    before = None
    deadline = time.monotonic() + period
    while True:
        with contextlib.suppress(OSError):  # a network file system may be unavailable for a while
            if (now := file.touched()) is None:
                return False
            if before is not None and now != before:
                return True
            before = now
        if time.monotonic() >= deadline:
            return before is None  # the owner of a lock that cannot be read may be alive
        time.sleep(file.heartbeat / 5)


def _touched(path: Path) -> int | None:
    """Return when the file was last touched, in nanoseconds by the clock of its file system, or None if it is gone.

    The file is opened because network file systems cache the result of a plain `stat`.
    """
    try:
        with open(path) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
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
