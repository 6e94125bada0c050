# D2R with its dependencies. `docker run --init IMAGE` runs the pipeline; docs/schedule.md lists the volumes to mount.
FROM python:3.11-slim-bookworm

WORKDIR /app
COPY pyproject.toml requirements.lock ./
# The lock file pins versions and hashes. Development dependencies are not installed.
ARG UV_VERSION=0.13.9
RUN pip install --no-cache-dir --quiet --target /tmp/uv uv==${UV_VERSION} \
    && python -m venv --without-pip /opt/venv \
    && /tmp/uv/bin/uv pip install --quiet --no-cache --system-certs --compile-bytecode --require-hashes \
        --python /opt/venv/bin/python --constraint requirements.lock --requirement pyproject.toml \
    && rm -rf /tmp/uv \
    && useradd --create-home --uid 1000 d2r \
    && chown 1000 /app

# The image has no git: the commit is passed as a build argument, and DVC runs without SCM.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GIT_PYTHON_REFRESH=quiet \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    MLFLOW_TRACKING_URI=sqlite:////app/state/mlflow.db \
    PREFECT_HOME=/app/state/prefect
COPY --chown=1000 . .
RUN pip --python /opt/venv/bin/python install --no-cache-dir --quiet --no-deps --no-build-isolation --editable . \
    && rm -rf build \
    && dvc config --local core.no_scm true \
    && mkdir .dvc/cache mlruns state \
    && chown -R 1000 .dvc mlruns state

USER 1000
ARG D2R_GIT_COMMIT=unknown
ENV D2R_GIT_COMMIT=${D2R_GIT_COMMIT}
VOLUME ["/app/.dvc/cache", "/app/mlruns", "/app/state"]
CMD ["d2r", "run"]
