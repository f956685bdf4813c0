"""The exceptions that a command turns into a line on standard error and an exit status."""


class UserError(Exception):
    """Something that the user can mend: a wrong path, setting or file. Its text says what is wrong and what would be right."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type: libraries' messages run over many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def complaint(message: object) -> str:
    """The line `aecr_jax: ...` about something that is wrong. What cannot be printed is escaped: file names may hold line breaks."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
    return f"aecr_jax: {text}"


class Stopped(Exception):
    """A run was asked to stop and has saved its state: the same command goes on. `status` is what the program exits with."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
