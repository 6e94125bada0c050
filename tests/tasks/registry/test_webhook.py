"""MLflow's webhooks announce a promotion to an HTTP receiver, which verifies the sender as docs/registry.md says."""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from mlflow import MlflowClient
from mlflow_server import Server
from registry_project import NAME, Project, make_project

from tasks.config.settings import Settings
from tasks.tracking import connection

pytestmark = pytest.mark.slow

SECRET = "known to MLflow and the receiver"


class Receiver(BaseHTTPRequestHandler):
    """Keeps the payloads whose signature is right and answers 401 to others."""

    payloads: list[dict[str, Any]] = []  # noqa: RUF012  # of the class: a new handler answers each request

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content = f"{self.headers['X-MLflow-Delivery-Id']}.{self.headers['X-MLflow-Timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.digest(SECRET.encode(), content, hashlib.sha256)).decode()
        is_genuine = hmac.compare_digest(f"v1,{expected}", self.headers["X-MLflow-Signature"])
        is_recent = abs(time.time() - int(self.headers["X-MLflow-Timestamp"])) < 300
        if is_genuine and is_recent:
            Receiver.payloads.append(json.loads(body))
        self.send_response(200 if is_genuine and is_recent else 401)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[int]:
    """The port of a running receiver."""
    Receiver.payloads.clear()
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    # Without the last two, MLflow calls https on public addresses only.
    server = Server(
        tmp_path,
        MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=Fernet.generate_key().decode(),
        MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https",
        MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
    )
    yield server
    server.kill()


def test_a_promotion_is_announced(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    receiver: int,
) -> None:
    project: Project = make_project(tmp_path, tmp_path_factory, tiny_settings, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")  # the client checks the address as well
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    connection.configure(project.settings, project.paths)
    for name, secret in (("deploy", SECRET), ("other", "of somebody else")):
        MlflowClient().create_webhook(
            name=name,
            url=f"http://127.0.0.1:{receiver}/",
            events=["model_version.created", "model_version_alias.created"],
            secret=secret,
        )
    project.promote(project.register())
    deadline = time.monotonic() + 30
    while len(Receiver.payloads) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    events = sorted(
        (payload["entity"], payload["data"].get("alias", ""), payload["data"]["name"], payload["data"]["version"])
        for payload in Receiver.payloads
    )
    assert events == [
        ("model_version", "", NAME, "1"),
        ("model_version_alias", "challenger", NAME, "1"),
        ("model_version_alias", "champion", NAME, "1"),
    ], "once each: what another secret signed is refused"
