"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something a user can mend. Its message names the file or key, what was found and what to do.

    Command-line entry points print it without a traceback and exit with 1.
    """
