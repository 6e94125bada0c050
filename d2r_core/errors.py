"""The exception for errors that a user can fix."""


class UserError(ValueError):
    """An error that the user can fix. The message names the file or key, the problem and the remedy.

    Command-line entry points print it without a traceback and exit with code 1.
    """
