"""A file server on this machine, for downloads: it can cut an answer off, refuse ranges, answer errors."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dpt_hpc.data.catalog import RawFile


@dataclass
class Served:
    """What the server has, and how it behaves. cuts: bytes after which its next answers break off, first to last.

    asked: the Range of every request (None: the whole file). errors: codes to answer with, first to last.
    """

    files: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    ranges: bool = True
    tag: str | None = '"one"'
    asked: list[str | None] = field(default_factory=list)
    address: str = ""

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


@contextmanager
def serving(files: dict[str, bytes], **behaviour: object) -> Iterator[Served]:
    """Serve `files` until the block ends."""
    served = Served(files, **behaviour)  # type: ignore[arg-type]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.headers.get("Range"))
            content = served.files.get(self.path.lstrip("/"))
            if served.errors or content is None:
                self.send_error(served.errors.pop(0) if served.errors else 404)
                return
            start = 0
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            same = self.headers.get("If-Range") in (None, served.tag)
            if asked and served.ranges and same:
                start = int(asked[1])
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
            self.send_response(206 if start else 200)
            if served.tag is not None:
                self.send_header("ETag", served.tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = start + served.cuts.pop(0) if served.cuts else len(content)
            with suppress(ConnectionError):  # a client that does not want this answer hangs up
                self.wfile.write(content[start:stop])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CONTENT = bytes(range(256)) * 40_000
"""Ten megabytes, so that an answer can be cut within."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def raw_file(url: str | None, content: bytes = CONTENT, **changes: Any) -> RawFile:
    return RawFile(**{"name": "set.bin", "url": url, "sha256": digest(content), "size": len(content), **changes})


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(name="server")
def _server() -> Iterator[Served]:
    with serving({"set.bin": CONTENT}) as served:
        yield served
