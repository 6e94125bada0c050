"""What many put before an MLflow server: a reverse proxy that asks for a user and a password."""

import base64
import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

USER, PASSWORD = "admin", "planted-hunter2"
_EXPECTED = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
_HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


@contextmanager
def authenticating_proxy(target_port: int) -> Iterator[int]:
    """The port of a proxy that forwards what comes with USER and PASSWORD, and answers 401 to everything else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != _EXPECTED:
                self._respond(401, {"WWW-Authenticate": "Basic"}, b"not authenticated")
                return
            upstream = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            self._respond(response.status, dict(response.getheaders()), response.read())
            upstream.close()

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 (http.server's names)

        def _respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
