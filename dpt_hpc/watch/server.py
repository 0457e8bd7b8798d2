"""A web server for one reader: a page, its style and scripts, and what the run says now. It takes nothing in."""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs

from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault
from dpt_hpc.watch.folder import Folder

PORT = 8765
PORTS_TRIED = 20
SECONDS_FOR_A_REQUEST = 30.0
HOST = re.compile(r"(?:\[(.+)\]|([^:\[\]]+))(?::\d+)?")
"""The header Host: an IPv6 address in brackets, or a name or an IPv4 address; and a port, which a tunnel changes."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer: the page may ask this server only, and nobody may frame it or load it elsewhere."""

FILES = {
    "": ("text/html", ("dpt_hpc.watch", "page.html")),
    "page.js": ("text/javascript", ("dpt_hpc.watch", "page.js")),
    "chart.js": ("text/javascript", ("dpt_hpc.watch", "chart.js")),
    "style.css": ("text/css", ("dpt_hpc.report", "style.css")),
    "watch.css": ("text/css", ("dpt_hpc.watch", "watch.css")),
}
"""What the page is made of; the style is the report's, and what a live page has beside."""


def open_server(path: Path, host: str = "127.0.0.1", port: int | None = None) -> WatchServer:
    """A server of the runs at `path`, bound and not yet serving; port: else the first free one from PORT on.

    Raises DataError where there is nothing to watch, ConfigError for a host that is not this machine's,
    EnvironmentFault for a port that is taken.
    """
    if not path.exists():
        raise DataError(
            f"run {path}: no such directory.\n"
            f"Start the run first, or watch the folder above, {path.parent}: runs appear there when they begin."
        )
    if not path.is_dir():
        raise DataError(f"run {path}: not a directory.\nName a run directory, or a folder above several.")
    ports = range(PORT, PORT + PORTS_TRIED) if port is None else (port,)
    for candidate in ports:
        try:
            return WatchServer(Folder(path), host, _resolved(host), candidate)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"--host {host}: not an address of this machine.\nUse one that is.") from None
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    tried = f"port {port} is" if port is not None else f"ports {ports[0]} to {ports[-1]} are"
    raise EnvironmentFault(f"{tried} taken, or not yours to use.\nName a free one with --port.")


class WatchServer(ThreadingHTTPServer):
    """Serves one folder of runs. address: the one to open. Beyond this machine's loopback it begins with a token, and
    no request without it is answered."""

    daemon_threads = True

    def __init__(self, folder: Folder, host: str, place: str, port: int) -> None:
        """host: as the user named it; place: its address."""
        address = ipaddress.ip_address(place)
        self.folder = folder
        self.token = "" if address.is_loopback else secrets.token_urlsafe(24)
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        self.files = {name: (kind, _resource(*source)) for name, (kind, source) in FILES.items()}
        self.address_family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        super().__init__((place, port), Handler)
        shown = socket.gethostname() if address.is_unspecified else host
        shown = f"[{shown}]" if ":" in shown else shown
        self.address = f"http://{shown}:{self.server_port}/" + (f"{self.token}/" if self.token else "")

    def server_bind(self) -> None:
        """Without the base class's look-up of this machine's full name, for which a bad resolver takes a minute."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that hangs up is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def is_own_name(self, host: str | None) -> bool:
        """Whether a request was meant for this machine: by its address, or by a name that is its own. A web page whose
        name its owner has turned to this address (DNS rebinding) would say its own name."""
        named = HOST.fullmatch(host or "")
        if named is None:
            return False
        try:
            ipaddress.ip_address(named[1] or named[2])
        except ValueError:
            return named[2] is not None and named[2].lower() in self.names
        return True

    def state(self, chosen: str | None, seen: str | None) -> bytes | None:
        """What the page shows, as JSON; None if that is what it has `seen`."""
        state = self.folder.look(chosen)
        text = json.dumps(state, allow_nan=False)
        version = hashlib.sha256(text.encode()).hexdigest()[:16]
        if version == seen:
            return None
        return json.dumps({"version": version, "now": time.time(), **state}, allow_nan=False).encode()


ELSEWHERE = "This machine has another name. Open the address that dpt-hpc watch printed, or name it with --host.\n"
NO_TOKEN = "This page opens with its whole address, token included, as dpt-hpc watch printed it.\n"


class Handler(BaseHTTPRequestHandler):
    """Answers GET; any other method is refused by the base class."""

    server: WatchServer
    server_version, sys_version = "dpt_hpc", ""
    timeout = SECONDS_FOR_A_REQUEST

    def do_GET(self) -> None:
        if not self.server.is_own_name(self.headers.get("Host")):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", ELSEWHERE.encode())
            return
        path, _, query = self.path.partition("?")
        name = path.lstrip("/")
        if self.server.token:
            given, slash, name = name.partition("/")
            if not hmac.compare_digest(given.encode(), self.server.token.encode()) or not slash:
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", NO_TOKEN.encode())
                return
        if name == "state":
            wanted = {key: values[-1] for key, values in parse_qs(query).items()}
            state = self.server.state(wanted.get("run"), wanted.get("seen"))
            self._answer(HTTPStatus.NO_CONTENT if state is None else HTTPStatus.OK, "application/json", state or b"")
        elif name in self.server.files:
            self._answer(HTTPStatus.OK, *self.server.files[name])
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is nothing here.\n")

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal is the user's."""


def _resource(package: str, name: str) -> bytes:
    return resources.files(package).joinpath(name).read_bytes()


def _resolved(host: str) -> str:
    """The address of a name of this machine."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"--host {host}: not a name or address that is known here ({error.strerror or error}).\n"
            "Use 127.0.0.1, 0.0.0.0 for all addresses of this machine, or one of them."
        ) from None
