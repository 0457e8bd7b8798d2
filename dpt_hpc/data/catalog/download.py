"""Downloads through pooch, whose only door this is: checked, resumed after a cut, one message for each fault."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pooch
import requests
from pooch.downloaders import doi_to_repository
from pooch.utils import parse_url

from dpt_hpc.data.catalog.entries import RawFile
from dpt_hpc.errors import DataError, EnvironmentFault

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and those of the whole file (None: unknown)."""

TRIES = 4
"""Times that a cut download is taken up again before giving up; none of them counts if it brought something new."""
BLOCK = 1 << 20
PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
NO_INTERNET = (
    "Without internet here: `dpt-hpc data mirror DIR NAME` where there is some, then --mirror DIR (or DPT_HPC_MIRROR)."
)


def download(file: RawFile, folder: Path, progress: Progress | None = None, timeout: float = 30.0) -> Path:
    """Fetch `file` into `folder` and compare its SHA-256, if that is known; returns its path.

    What an earlier, cut download left is taken up again. timeout: seconds without an answer. Raises DataError for an
    answer that is not this file (404, other bytes); EnvironmentFault for a server that cannot be reached, a cut that
    lasts (what has come stays), and a disk that does not take it.
    """
    assert file.url is not None, file.name
    folder.mkdir(parents=True, exist_ok=True)
    _room(file, folder)
    pooch.get_logger().setLevel("WARNING")
    transfer = Transfer(file, folder / f"{file.name}.part", progress, timeout)
    try:
        pooch.retrieve(
            file.url,
            known_hash=None if file.sha256 is None else f"sha256:{file.sha256}",
            fname=file.name,
            path=folder,
            downloader=transfer,
        )
    except ValueError as error:  # pooch's word for a wrong hash
        found = re.search(r"got ([0-9a-f]{64})", str(error))
        if found is None:
            raise
        raise DataError(
            f"{file.url}: SHA-256 is {found[1]}, expected {file.sha256}.\n"
            "The file has been replaced, or was damaged on the way; what came is deleted.\n"
            "Try once more; if it stays so, take the file from a --mirror DIR."
        ) from None
    return folder / file.name


class Transfer:
    """pooch's downloader: goes on where the .part file beside the goal ends, and hands it over when it is whole."""

    def __init__(self, file: RawFile, part: Path, progress: Progress | None, timeout: float) -> None:
        self.file, self.part, self.progress, self.timeout = file, part, progress, timeout
        self.tag = part.with_name(part.name + ".tag")

    def __call__(self, url: str, output_file: Any, _: Any) -> None:
        """Raises as `download` does."""
        tries = 0
        while True:
            before = self._there()
            try:
                self._transfer(self._address(url))
                break
            except requests.HTTPError as error:
                raise _refused(url, error.response) from None
            except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError, requests.Timeout) as error:
                came = self._there()
                tries = 1 if came > before else tries + 1
                if tries == TRIES or not came:
                    raise _unreached(url, came, self.file.size, error) from None
            except requests.RequestException as error:
                raise _unreached(url, self._there(), self.file.size, error) from None
            except OSError as error:
                raise _not_written(self.part, error) from None
        shutil.move(self.part, output_file)
        self.tag.unlink(missing_ok=True)

    def _there(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _address(self, url: str) -> str:
        """Where the bytes are: of a DOI, what its repository says."""
        if not url.startswith("doi:"):
            return url
        parts = parse_url(url)
        try:
            return str(doi_to_repository(parts["netloc"]).download_url(parts["path"].lstrip("/")))
        except ValueError as error:
            raise DataError(f"{url}: {error}\nThe record has changed: take the file from a --mirror DIR.") from None

    def _transfer(self, url: str) -> None:
        start = self._there()
        tag = self.tag.read_text() if self.tag.exists() else None
        if start and self.file.sha256 is None and tag is None:
            start = 0  # nothing would tell that the two halves are of one file
        # Not compressed for the way: the digest is that of the file, and a part can only be added to bytes.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if tag is not None:
                headers["If-Range"] = tag
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout) as answer:
            if start and answer.status_code == requests.codes.requested_range_not_satisfiable:
                if answer.headers.get("Content-Range") == f"bytes */{start}":
                    return  # it was cut after the last byte
                self.part.unlink()
                self._transfer(url)
                return
            answer.raise_for_status()
            if answer.status_code != requests.codes.partial_content:
                start = 0
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            if total is not None and self.file.size is not None and total != self.file.size:
                raise DataError(
                    f"{url}: has {total:,} bytes, expected {self.file.size:,}: not the file that is pinned.\n"
                    "Take the file from a --mirror DIR."
                )
            self._keep(answer.headers.get("ETag"))
            with self.part.open("ab") as stream:
                _lock(stream, self.part)
                stream.truncate(start)
                for block in answer.iter_content(BLOCK):
                    stream.write(block)
                    if self.progress is not None:
                        self.progress(stream.tell(), total)

    def _keep(self, tag: str | None) -> None:
        if tag is None or tag.startswith("W/"):
            self.tag.unlink(missing_ok=True)
        else:
            self.tag.write_text(tag)


def _lock(stream: IO[bytes], part: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EnvironmentFault(
            f"{part}: another process downloads this file.\nWait for it, or name another directory with --out."
        ) from None
    except OSError:
        pass  # a file system without locks


def _room(file: RawFile, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    part = folder / f"{file.name}.part"
    missing = 0 if file.size is None else file.size - (part.stat().st_size if part.exists() else 0)
    if missing > free:
        raise EnvironmentFault(
            f"{folder}: {file.name} needs {missing / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free.\n"
            "Make room, or name another directory with --out."
        )


def _refused(url: str, answer: requests.Response | None) -> DataError | EnvironmentFault:
    assert answer is not None, url
    code = f"{answer.status_code} {answer.reason}"
    if answer.status_code == requests.codes.proxy_authentication_required:
        return _unreached(url, 0, None, requests.exceptions.ProxyError(code))
    if answer.status_code >= 500 or answer.status_code == requests.codes.too_many:
        return EnvironmentFault(
            f"{url}: the server answers {code}.\nTry again later, or take the file from --mirror DIR."
        )
    return DataError(
        f"{url}: the server answers {code}.\nThe file has moved or is no longer public: take it from a --mirror DIR."
    )


def _unreached(url: str, came: int, size: int | None, error: Exception) -> EnvironmentFault:
    if came:
        whole = "" if size is None else f" of {size:,}"
        return EnvironmentFault(
            f"{url}: cut off after {came:,}{whole} bytes, {TRIES} times in a row ({_word(error)}).\n"
            "They are kept: the same command goes on from there."
        )
    proxy = next((f"{name}={os.environ[name]}" for name in PROXIES if os.environ.get(name)), None)
    hint = (
        f"The proxy is {proxy}: check it."
        if proxy
        else "If this machine reaches the internet through a proxy, set HTTPS_PROXY=http://HOST:PORT."
    )
    return EnvironmentFault(f"{url}: cannot be reached ({_word(error)}).\n{hint}\n{NO_INTERNET}")


def _word(error: Exception) -> str:
    """The innermost reason, without the objects around it."""
    text = str(error)
    inner = re.findall(r"\[Errno -?\d+\] ([^'\")]+)|(timed out|Connection broken|407 [A-Za-z ]+)", text)
    return next((a or b for a, b in reversed(inner)), type(error).__name__)


def _not_written(part: Path, error: OSError) -> EnvironmentFault:
    kept = "What has come is kept: the same command goes on from there."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFault(f"{part}: {error.strerror}.\nMake room, or name another directory with --out. {kept}")
    return EnvironmentFault(f"{part}: cannot be written: {error.strerror or error}.\nCheck the directory. {kept}")
