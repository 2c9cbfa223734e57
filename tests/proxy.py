"""A proxy before a real server that can fail first: with a status, with nonsense, or by hanging up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


class Proxy:
    """What passed: ``asked`` holds the path, the body and the key of every request that was forwarded.

    ``faults`` are spent one per request before anything is forwarded: a status, "html" (a page with status 200),
    or "hang up". ``key`` is demanded where it is set. A path that is ``absent`` gives 404. After ``stalls_after`` completions no further one is answered.
    """

    def __init__(self, target: str) -> None:
        self.target, self.url = target, ""
        self.faults: list[int | str] = []
        self.asked: list[tuple[str, dict[str, Any], str]] = []
        self.tries = 0
        self.key: str | None = None
        self.absent = ""
        self.stalls_after: int | None = None
        self.ended = threading.Event()
        self.lock = threading.Lock()

    def prompts(self, key: str | None = None) -> list[Any]:
        """The prompts of all completions so far, or of those that were asked for with a key."""
        sent = [(body, given) for path, body, given in self.asked if path == "/v1/completions"]
        return [body["prompt"] for body, given in sent if key is None or given == key]


@contextmanager
def proxy_before(target: str) -> Iterator[Proxy]:
    """Run a proxy on a free port of the loopback interface until the block is left."""
    proxy = Proxy(target)
    client = httpx.Client(base_url=target, timeout=120)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._pass(b"")

        def do_POST(self) -> None:
            self._pass(self.rfile.read(int(self.headers.get("content-length", 0))))

        def _pass(self, body: bytes) -> None:
            with proxy.lock:
                proxy.tries += 1
                fault = proxy.faults.pop(0) if proxy.faults else None
            if fault == "hang up":
                self.connection.close()
                self.close_connection = True
            elif fault == "html":
                self._answer(200, b"<html>welcome</html>")
            elif isinstance(fault, int):
                self._answer(fault, b'{"error": {"message": "as the test\\nwants it"}}', [("retry-after", "0")])
            elif self.path == proxy.absent:
                self._answer(404, b'{"detail": "Not Found"}')
            elif proxy.key is not None and self.headers.get("authorization") != f"Bearer {proxy.key}":
                self._answer(401, b"{}")
            else:
                key = self.headers.get("authorization", "").removeprefix("Bearer ")
                with proxy.lock:
                    proxy.asked.append((self.path, json.loads(body or b"{}"), key))
                    late = proxy.stalls_after is not None and len(proxy.prompts()) > proxy.stalls_after
                if late:
                    proxy.ended.wait(120)
                told = client.request(
                    self.command, self.path, content=body, headers={"content-type": "application/json"}
                )
                self._answer(told.status_code, told.content)

        def _answer(self, status: int, content: bytes, more: list[tuple[str, str]] | None = None) -> None:
            try:
                self.send_response(status)
                for name, value in [("content-length", str(len(content))), *(more or [])]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                self.close_connection = True  # the client was killed

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        proxy.ended.set()
        server.shutdown()
        server.server_close()
        client.close()
