"""A server of the page for the browser on the same machine."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aecr_jax.errors import UserError

HOST = "127.0.0.1"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".jpg": "image/jpeg",
    ".svg": "image/svg+xml",
}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # browsers drop connections when a run is cancelled or the page is closed
            super().handle_error(request, client_address)


def make_server(site: Mapping[str, bytes], port: int) -> ThreadingHTTPServer:
    """Return a server that answers on the loopback address only, with the files of `site`, which maps paths to contents.

    Args:
      site: see `aecr_jax.web.site.make_site`.
      port: the port; 0 takes a free one.

    Raises:
      UserError: the port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0].removeprefix("/") or "index.html"
            content = site.get(path)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", _TYPES.get(posixpath.splitext(path)[1], "application/octet-stream"))
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-cache")
            # With these two, browsers let the page use several threads.
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass  # a line for each file would hide the address

    try:
        return _Server((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port (={port}) cannot be used: {reason}; choose another, or 0 for a free one") from error
