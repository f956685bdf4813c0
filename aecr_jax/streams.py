"""Standard output and standard error where they cannot be written: closed pipes and full disks."""

from __future__ import annotations

import os
import select
import sys
from typing import Any

from aecr_jax.errors import UserError


def flush(stream: Any) -> None:
    """Flush a stream; raise UserError or BrokenPipeError if that fails."""
    try:
        if stream is not None:
            stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(stream)
        raise UserError(_unwritable(error)) from error


def _unwritable(error: OSError) -> str:
    return f"standard output cannot be written: {error.strerror}"


def explain_output(error: OSError) -> str | None:
    """Return a message if an OSError was caused by writing to standard output, or None for any other OSError."""
    if error.filename is not None or sys.stdout is None:
        return None
    try:
        print(flush=True)
    except OSError as again:
        discard(sys.stdout)
        return _unwritable(again)
    return None


def discard(stream: Any) -> None:
    """Discard everything that is still to be written to `stream`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def has_no_reader(stream: Any) -> bool:
    """Return whether a stream is a pipe whose reading end is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # request no events, because errors are always reported
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no stream, a stream without a file, or a system without poll (Windows)
        return False
