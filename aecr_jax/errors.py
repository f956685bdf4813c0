"""The one exception that a command turns into a line on standard error and exit status 2."""


class UserError(Exception):
    """Something that the user can mend: a wrong path, setting or file. Its text says what is wrong and what would be right."""
