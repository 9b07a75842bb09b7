"""A server on this machine that serves files as the web does."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

from errata.data.sources import Source
from helpers.entries import NESTED, numbered

CONTENT = json.dumps(numbered(NESTED, 300)).encode()


class Server(http.server.ThreadingHTTPServer):
    """Serves one content under any path; `stops` are numbers of bytes after which answers break off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.version, self.stops, self.status, self.ranges = CONTENT, '"v1"', [], 200, []

    def handle_error(self, request, client_address):
        pass

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/dsets"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if asked and self.headers.get("If-Range", server.version) != server.version:
            begin = 0
        if asked and begin >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[begin:]
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}")
        if server.version:
            self.send_header("ETag", server.version)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.stops.pop(0)] if server.stops else body)
        self.wfile.flush()
        self.close_connection = True


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def of(server, **fields) -> Source:
    known = {"name": "counterfact", "file": "counterfact.json", "what": "", "schema": "records", "licence": ""}
    return Source(**{**known, "citation": "", "host": server.host, **fields})
