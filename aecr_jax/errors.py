"""Exceptions that a command reports as a line on standard error and an exit status."""


class UserError(ValueError):
    """An error that the user can fix: a wrong path, setting or file. Its message says what is wrong and how to put it right."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message (at most 300 characters), or its type: messages of libraries may have many lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def complaint(message: object) -> str:
    """Return the line `aecr_jax: ...` that reports a problem. Unprintable characters are escaped: file names may hold line breaks."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
    return f"aecr_jax: {text}"


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the same command resumes it. `status` is the program's exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
