"""Where MLflow is."""

import os

from tasks.config.settings import Settings


def tracking_uri(settings: Settings) -> str:
    """The address of MLflow as a person writes it: the variable MLFLOW_TRACKING_URI, or `tracking.uri`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or settings.tracking.uri
