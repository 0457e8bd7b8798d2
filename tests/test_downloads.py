"""Downloads, from a server on this machine: checked, taken up again after a cut, and every fault told with its cure."""

from __future__ import annotations

import fcntl
import resource
from pathlib import Path

import pytest
from file_server import (  # noqa: F401 - two are fixtures
    CONTENT,
    Served,
    _no_proxy,
    _server,
    digest,
    quiet,
    raw_file,
    serving,
)

from dpt_hpc.data.catalog import Sources, obtain
from dpt_hpc.data.catalog.download import download
from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault


def test_a_download_is_checked_and_not_repeated(server: Served, tmp_path: Path) -> None:
    file = raw_file(server.url("set.bin"))
    shown: list[tuple[int, int | None]] = []
    first = obtain(file, tmp_path, Sources(progress=lambda done, total: shown.append((done, total))), quiet)
    assert first.path.read_bytes() == CONTENT
    assert (first.verified, first.how) == (True, "downloaded")
    assert shown[-1] == (len(CONTENT), len(CONTENT))
    assert obtain(file, tmp_path, Sources(), quiet).how == "already there"
    assert server.asked == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["set.bin"]


def test_a_cut_download_goes_on_where_it_ended(server: Served, tmp_path: Path) -> None:
    server.cuts = [3_000_000, 2_000_000]
    assert download(raw_file(server.url("set.bin")), tmp_path).read_bytes() == CONTENT
    starts = [int(asked[6:-1]) if asked else 0 for asked in server.asked]
    assert starts[0] == 0
    assert 2_000_000 < starts[1] < starts[2] <= 5_000_000


def test_a_download_that_stays_cut_is_kept_for_the_next_command(server: Served, tmp_path: Path) -> None:
    server.cuts = [3_000_000, 0, 0, 0, 0]
    file = raw_file(server.url("set.bin"))
    with pytest.raises(
        EnvironmentFault, match=r"cut off after [\d,]+ of 10,240,000 bytes, 4 times in a row.*\nThey are"
    ):
        download(file, tmp_path)
    assert not (tmp_path / "set.bin").exists()
    server.cuts, server.asked = [], []
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.asked[0] is not None


def test_a_server_without_ranges_sends_the_whole_again(server: Served, tmp_path: Path) -> None:
    server.cuts, server.ranges = [3_000_000], False
    assert download(raw_file(server.url("set.bin")), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("tag", ['"one"', None])
def test_halves_of_two_versions_are_not_joined_where_no_digest_would_tell(
    server: Served, tmp_path: Path, tag: str | None
) -> None:
    server.cuts, server.tag = [3_000_000, 0, 0, 0, 0, 0], tag
    file = raw_file(server.url("set.bin"), sha256=None, size=None)
    with pytest.raises(EnvironmentFault):
        download(file, tmp_path)
    server.files["set.bin"] = CONTENT[::-1]
    server.cuts, server.tag = [], tag and '"two"'
    assert download(file, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_part_that_is_whole_is_taken_as_it_is(server: Served, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(CONTENT)
    assert download(raw_file(server.url("set.bin")), tmp_path).read_bytes() == CONTENT
    (tmp_path / "set.bin").rename(tmp_path / "set.bin.part")
    with (tmp_path / "set.bin.part").open("ab") as stream:
        stream.write(b"more")
    assert download(raw_file(server.url("set.bin")), tmp_path).read_bytes() == CONTENT


def test_other_bytes_are_refused_with_both_digests(server: Served, tmp_path: Path) -> None:
    file = raw_file(server.url("set.bin"), CONTENT[::-1])
    with pytest.raises(DataError) as caught:
        download(file, tmp_path)
    assert f"SHA-256 is {digest(CONTENT)}, expected {digest(CONTENT[::-1])}" in str(caught.value)
    assert "--mirror DIR" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="has 10,240,000 bytes, expected 7: not the file that is pinned"):
        download(raw_file(server.url("set.bin"), size=7), tmp_path)


def test_what_the_server_refuses_is_told_with_its_code(server: Served, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.bin: the server answers 404 Not Found\.\nThe file has moved"):
        download(raw_file(server.url("gone.bin")), tmp_path)
    server.errors = [503]
    with pytest.raises(EnvironmentFault, match=r"the server answers 503 Service Unavailable\.\nTry again later"):
        download(raw_file(server.url("set.bin")), tmp_path)


def test_without_internet_the_message_names_proxy_and_mirror(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = raw_file("http://127.0.0.1:9/set.bin")
    with pytest.raises(EnvironmentFault) as caught:
        download(closed, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "http://127.0.0.1:9/set.bin: cannot be reached (Connection refused)."
    assert "set HTTPS_PROXY=http://HOST:PORT" in lines[1]
    assert "--mirror DIR (or DPT_HPC_MIRROR)" in lines[2]
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(EnvironmentFault, match=r"The proxy is HTTP_PROXY=http://127\.0\.0\.1:9: check it"):
        download(raw_file(server.url("set.bin")), tmp_path)
    assert server.asked == []


def test_a_disk_without_room_is_told_before_and_during_a_download(server: Served, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"set\.bin needs 1e\+09 GB, but .* GB are free\.\nMake room"):
        download(raw_file(server.url("set.bin"), size=10**18), tmp_path)
    file = raw_file(server.url("set.bin"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        with pytest.raises(EnvironmentFault, match=r"set\.bin\.part: cannot be written: File too large") as caught:
            download(file, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command goes on from there" in str(caught.value)
    assert (tmp_path / "set.bin.part").stat().st_size == 4_000_000
    server.asked.clear()
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=4000000-"]


def test_two_processes_do_not_write_into_one_part(server: Served, tmp_path: Path) -> None:
    with (tmp_path / "set.bin.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            EnvironmentFault, match=r"set\.bin\.part: another process downloads this file\.\nWait for it"
        ):
            download(raw_file(server.url("set.bin")), tmp_path)
    assert download(raw_file(server.url("set.bin")), tmp_path).read_bytes() == CONTENT


# Files without a known digest, or without an address.


def test_a_file_without_a_digest_is_taken_only_when_asked(server: Served, tmp_path: Path) -> None:
    file = raw_file(server.url("set.bin"), sha256=None, size=None)
    with pytest.raises(ConfigError, match=r"set\.bin: no SHA-256 of this file is known.*\nTake it .*--unverified"):
        obtain(file, tmp_path, Sources(), quiet)
    assert server.asked == []
    told: list[str] = []
    found = obtain(file, tmp_path, Sources(unverified=True), told.append)
    assert (found.sha256, found.verified) == (digest(CONTENT), False)
    assert f"sha256 {digest(CONTENT)} (NOT VERIFIED, none is known)" in told[-1]


def test_a_file_without_an_address_comes_from_a_mirror(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no public address holds this file\.\nName a directory.*DPT_HPC_MIRROR"):
        obtain(raw_file(None), tmp_path, Sources(), quiet)
