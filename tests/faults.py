"""A proxy in front of an object store that answers with errors, late, or half, as often as it is told to."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: what can happen to a request
KINDS = ("error", "busy", "slow", "cut before", "cut after", "cut inside")
_ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>injected</Message></Error>'


class FaultyProxy:
    """Passes requests on to a server of this machine; see the module.

    Parameters
    ----------
    port : int
        Of the server.
    faults : int
        Requests that something happens to, spread by chance over all until they are used up.
    slow_s : float
        Longer than the client waits.
    """

    def __init__(self, port: int, faults: int, slow_s: float, seed: int) -> None:
        self.made: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._left = faults
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._draw(self.command)
                if fault == "cut before":
                    self._cut()
                    return
                if fault in ("error", "busy"):
                    code, name = (500, b"InternalError") if fault == "error" else (503, b"SlowDown")
                    self._answer(code, [("Content-Type", "application/xml")], _ERROR % name)
                    return
                server = http.client.HTTPConnection("127.0.0.1", port)
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                data = answer.read()
                server.close()
                if fault == "slow":
                    time.sleep(slow_s)
                if fault == "cut after":
                    self._cut()
                    return
                self._answer(answer.status, answer.getheaders(), data, cut=fault == "cut inside")

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

            def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
                try:
                    self.send_response_only(status)
                    for name, value in headers:
                        if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                            self.send_header(name, value)
                    length = {n.lower(): v for n, v in headers}.get("content-length")
                    self.send_header(
                        "Content-Length", length if self.command == "HEAD" and length else str(len(data))
                    )
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(data[: len(data) // 2] if cut else data)
                    if cut:
                        self._cut()
                except OSError:
                    self.close_connection = True  # the client no longer waits

            def _cut(self) -> None:
                self.close_connection = True
                try:
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _draw(self, method: str) -> str | None:
        with self._lock:
            self.requests[method] += 1
            if self._left and self._rng.random() < 0.6:
                self._left -= 1
                (kind,) = self._rng.choices(KINDS, (3, 3, 1, 3, 3, 3))
                self.made[kind] += 1
                return kind
        return None

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
