"""Errors of the tracking server: what caused them, and one message for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from d2r_core.errors import UserError


class UnavailableError(UserError):
    """The server does not answer, or its database is locked: trying again may help."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the errors of MLflow and of the connection to it into one message.

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
        if any(map(_is_transient, _chain(error))):
            raise UnavailableError(
                f"MLflow at {mlflow.get_tracking_uri()} does not answer ({root_cause(error)}). Start it, or "
                "correct tracking.uri in params.yaml or the variable MLFLOW_TRACKING_URI."
            ) from error
        raise UserError(f"MLflow at {mlflow.get_tracking_uri()} refuses: {_first_line(error)}") from error


def root_cause(error: BaseException) -> str:
    """The first line of the message of the error that caused all others."""
    return _first_line(list(_chain(error))[-1])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the root cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_transient(error: BaseException) -> bool:
    """Whether the network failed or the database was locked."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return bool(error.error_code == "TEMPORARILY_UNAVAILABLE")
    return isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.RetryError)
