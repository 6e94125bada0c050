"""Errors of the tracking server: what caused them, and one message for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from d2r_core.errors import UserError
from tasks.config.credentials import redact, without_credentials


class UnavailableError(UserError):
    """The server does not answer, or its database is locked: trying again may help."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the errors of MLflow and of the connection to it into one message, without credentials.

    The causes are left out: a traceback that shows them, as Prefect stores it, would show the server's address in them.

    Raises:
        UnavailableError: when trying again may help.
        UserError: for everything else that MLflow reports.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        uri = mlflow.get_tracking_uri()
        if any(map(_is_transient, _chain(error))):
            raise UnavailableError(
                f"MLflow at {without_credentials(uri)} does not answer ({root_cause(error, uri)}). Start it, or "
                "correct tracking.uri in params.yaml or the variable MLFLOW_TRACKING_URI."
            ) from None
        raise UserError(f"MLflow at {without_credentials(uri)} refuses: {_first_line(error, uri)}") from None


def root_cause(error: BaseException, uri: str = "") -> str:
    """The first line of the message of the error that caused all others, without credentials.

    Args:
        uri: the server's, as in `redact`.
    """
    return _first_line(list(_chain(error))[-1], uri)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the root cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException, uri: str) -> str:
    return (redact(str(error), uri).splitlines() or [type(error).__name__])[0]


def _is_transient(error: BaseException) -> bool:
    """Whether the network failed or the database was locked."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return bool(error.error_code == "TEMPORARILY_UNAVAILABLE")
    return isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.RetryError)
