"""Where MLflow is."""

import os

from tasks.config.credentials import without_credentials
from tasks.config.settings import Settings


def tracking_uri(settings: Settings) -> str:
    """The address of MLflow as a person writes it: the variable MLFLOW_TRACKING_URI, or `tracking.uri`.

    It may hold a password: print and store `public_uri` instead.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or settings.tracking.uri


def public_uri(settings: Settings) -> str:
    """The address of MLflow without user, password and other secrets: for people, logs and records."""
    return without_credentials(tracking_uri(settings))
