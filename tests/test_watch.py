"""dpt-hpc watch without a browser: what it reads of a log that grows, and whom the server answers."""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from small_runs import Options, finetune_options, run

from dpt_hpc.cli import run_command_line
from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.monitor import Monitor
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.watch import log as log_module
from dpt_hpc.watch.faults import last_error, skipped_steps
from dpt_hpc.watch.folder import Folder
from dpt_hpc.watch.log import Log
from dpt_hpc.watch.server import WatchServer, open_server
from dpt_hpc.watch.thinned import POINTS, Thinned


def step(number: int, loss: Any = 1.0, epoch: int = 1) -> dict[str, Any]:
    return {"kind": "step", "epoch": epoch, "step": number, "time": 1000.0 + number, "loss": loss}


def epoch(number: int, at: int) -> dict[str, Any]:
    return {"kind": "epoch", "epoch": number, "step": at, "time": 1000.0 + at, "validation": {"loss": 1.0}}


def append(path: Path, *records: Any) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def losses(log: Log) -> list[tuple[float, float]]:
    return log.steps["loss"].points if "loss" in log.steps else []


@contextmanager
def served(path: Path, host: str = "127.0.0.1") -> Iterator[WatchServer]:
    """A server in this process, on a port that is free."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    with open_server(path, host, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: WatchServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    log = Log(tmp_path / "metrics.jsonl")
    log.read()
    assert not log.epochs
    append(log.path, epoch(0, 0), step(1))
    with log.path.open("a") as file:
        file.write('{"kind": "step", "epoch": 1, "st')
    log.read()
    assert losses(log) == [(1, 1.0)]
    with log.path.open("a") as file:
        file.write('ep": 2, "loss": 0.5}\n')
    log.read()
    assert (losses(log), log.damaged) == ([(1, 1.0), (2, 0.5)], 0)


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes] = []
    take = Log._take
    monkeypatch.setattr(Log, "_take", lambda self, line: (taken.append(line), take(self, line)))
    monkeypatch.setattr(log_module, "PIECE", 400)
    log = Log(tmp_path / "metrics.jsonl")
    append(log.path, *(step(i) for i in range(1, 21)))
    log.read()
    assert 0 < log.behind < 1
    while log.behind:
        log.read()
    append(log.path, step(21))
    log.read()
    assert [json.loads(line)["step"] for line in taken] == list(range(1, 22))


def test_a_run_that_goes_on_from_a_checkpoint_is_not_drawn_twice(tmp_path: Path) -> None:
    log = Log(tmp_path / "metrics.jsonl")
    append(log.path, *(step(i) for i in range(1, 5)), epoch(1, 4), step(5, epoch=2), step(6, epoch=2))
    log.read()
    append(log.path, step(5, 0.25, epoch=2))  # in the same file
    log.read()
    assert losses(log)[-2:] == [(4, 1.0), (5, 0.25)]
    assert [r["epoch"] for r in log.epochs] == [1]
    replaced = log.path.with_name(".metrics.jsonl")  # as the trainer does it
    append(replaced, *(step(i, 0.125) for i in range(1, 5)))
    replaced.rename(log.path)
    append(log.path, *(step(i, 0.125, epoch=2) for i in range(5, 30)))
    log.read()
    assert losses(log) == [(i, 0.125) for i in range(1, 30)]
    assert not log.epochs


def test_what_is_no_number_or_no_record_is_left_out_and_counted(tmp_path: Path) -> None:
    log = Log(tmp_path / "metrics.jsonl")
    append(log.path, step(1), step(2, None), step(3, math.nan), step(4, math.inf), [1], {"kind": "step"}, "text")
    with log.path.open("a") as file:
        file.write("{broken\n" + "[" * 100_000 + "\n")
    append(log.path, step(5, 0.5))
    log.read()
    assert losses(log) == [(1, 1.0), (5, 0.5)]
    assert (log.not_finite, log.damaged) == (3, 5)


def test_a_million_steps_are_as_few_points_as_a_chart_is_wide() -> None:
    series = Thinned()
    for i in range(100_000):
        series.add(i, i % 2)
    points = series.points
    assert POINTS / 2 <= len(points) <= POINTS
    assert all(value == 0.5 for _, value in points[:-1])
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    series.cut(50_000)
    assert 49_000 < series.points[-1][0] < 50_000


def test_a_finished_run_is_shown_whole(finished: tuple[Options, Path]) -> None:
    state = Folder(finished[1]).look(None)
    json.dumps(state, allow_nan=False)
    (row,) = state["runs"]
    assert (row["state"], row["epoch"], row["epochs"]) == ("finished", 3, 3)
    shown = state["run"]
    charts = {chart["key"]: chart for chart in shown["charts"]}
    assert {"loss", "energy_per_atom", "forces", "stress", "learning_rate", "waiting", "grad_norm"} <= set(charts)
    assert {"structures_per_second", "atoms_per_second"} <= set(charts)
    forces = {line["label"]: [x for x, _ in line["points"]] for line in charts["forces"]["lines"]}
    assert forces == {"train": [1, 2, 3], "validation": [0, 1, 2, 3]}
    steps = charts["loss"]["lines"][0]["points"]
    assert [x for x, _ in steps] == pytest.approx([i / 5 for i in range(1, 16)], rel=1e-4)
    assert (shown["done"], shown["left"], shown["error"], shown["skipped"]) == (1.0, None, None, [])


def test_any_other_number_of_the_log_has_a_chart(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", *({**step(i), "gpu_memory_gb": 10 + i} for i in range(3)))
    shown = Folder(tmp_path).look(None)["run"]
    (chart,) = (chart for chart in shown["charts"] if chart["key"] == "gpu_memory_gb")
    assert chart["title"] == "GPU memory, GB"
    assert [y for _, y in chart["lines"][0]["points"]] == [10, 11, 12]


def test_the_end_is_foretold_from_the_pace_since_the_last_start(finished: tuple[Options, Path], tmp_path: Path) -> None:
    """Two steps took ten seconds each before a break of a day, five of them one second each after it."""
    path = tmp_path / "run"
    path.mkdir()
    for name in ("config.yaml", "run.json"):
        (path / name).write_bytes((finished[1] / name).read_bytes())
    facts = json.loads((path / "run.json").read_text())
    facts = {k: v for k, v in facts.items() if k not in ("finished", "wall_seconds")}
    facts |= {"started": "2026-01-01T00:00:00+00:00", "resumed": ["2026-01-02T00:00:00+00:00"]}
    (path / "run.json").write_text(json.dumps(facts))
    began = 1767312000.0  # the second start
    times = [began - 86000, began - 85990, *(began + i for i in range(1, 6))]
    append(path / "metrics.jsonl", *({**step(i + 1), "time": time} for i, time in enumerate(times)))
    numbers = {name: value for name, value, _ in Folder(path).look(None)["run"]["numbers"]}
    assert numbers["Time left"].replace("\u00a0", " ") == "8 s"  # 15 steps in all


def test_the_seeds_of_a_fine_tuning_are_a_table_of_runs(finished: tuple[Options, Path], tmp_path: Path) -> None:
    config = finetune_options(finished[0], tmp_path / "tuned")
    finetune(config, Ranks(), quiet=True)
    folder = Folder(tmp_path / "tuned")
    state = folder.look(None)
    assert [row["name"] for row in state["runs"]] == ["seed_0", "seed_1"]
    assert all(row["test"] != "—" for row in state["runs"])
    chosen = folder.look(state["runs"][0]["key"])["run"]
    assert chosen["name"] == "seed_0"
    assert "target" in {chart["key"] for chart in chosen["charts"]}


def test_runs_that_begin_later_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpt_hpc.watch.folder.SECONDS_BETWEEN_SEARCHES", 0)
    folder = Folder(tmp_path)
    assert folder.look(None)["run"] is None
    for name in ("seed_10", "seed_9"):
        (tmp_path / name).mkdir()
        append(tmp_path / name / "metrics.jsonl", step(1))
    assert [row["name"] for row in folder.look(None)["runs"]] == ["seed_9", "seed_10"]


def test_a_finished_run_that_goes_on_to_more_epochs_is_not_finished(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    run_dir = Path(copytree(finished[1], tmp_path / "run"))
    facts = json.loads((run_dir / "run.json").read_text())
    del facts["finished"]  # as when it is resumed; results.json is still there
    (run_dir / "run.json").write_text(json.dumps(facts))
    state = Folder(run_dir).look(None)
    assert state["runs"][0]["state"] == "not finished"


def test_warnings_of_a_run_are_in_its_log_and_on_the_page(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 10, -1, quiet=True)
    monitor.step(1, 3, {"loss": 1.0, "structures_per_second": 2.0})
    for number in range(9):
        monitor.warn(f"checkpoint {number}: <b>disk</b> full")
    monitor.close()
    log = Log(tmp_path / "metrics.jsonl")
    log.read()
    assert (log.step, log.damaged) == (3, 0)
    assert list(log.warnings) == [f"Epoch 1, step 3: checkpoint {n}: <b>disk</b> full" for n in range(4, 9)]


def test_a_damaged_file_is_told_in_the_place_of_the_run(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", step(1))
    (tmp_path / "run.json").write_text("{")
    assert "run.json: not valid JSON" in Folder(tmp_path).look(None)["run"]["subject"]


def test_errors_and_skipped_steps_are_told(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options = finished[0] | {"optimizer": {"learning_rate": 1e30}}
    with pytest.raises(Exception, match="not finite"):
        run(options, tmp_path / "run")
    error, skipped = last_error(tmp_path / "run"), skipped_steps(tmp_path / "run")
    assert error is not None
    assert error["message"].startswith("dpt_hpc.train.failures.DivergedError: epoch ")
    assert "Traceback" in error["traceback"]
    assert "Traceback" not in error["message"]
    assert len(skipped) == 4
    assert "Structures: " in skipped[0]
    assert Folder(tmp_path).look(None)["runs"][0]["state"] == "ended by an error"


def test_the_server_gives_only_its_page_and_only_by_get(finished: tuple[Options, Path]) -> None:
    with served(finished[1]) as server:
        status, headers, page = ask(server, "/")
        assert (status, b"<noscript>" in page) == (200, True)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
        assert "unsafe" not in policy
        status, _, content = ask(server, "/state")
        version = json.loads(content)["version"]
        assert ask(server, f"/state?seen={version}")[0] == 204
        assert ask(server, "/state?run=../../etc")[0] == 200
        for path in ("/../../etc/passwd", "/page.html", "/metrics.jsonl", "/%2e%2e/run.json", "//["):
            assert ask(server, path)[0] == 404, path
        assert ask(server, "/", "POST")[0] == ask(server, "/", "DELETE")[0] == 501


def test_a_name_that_is_not_this_machines_is_refused(finished: tuple[Options, Path]) -> None:
    """A web page of another name that its owner has turned to 127.0.0.1 must not read the run."""
    with served(finished[1]) as server:
        for host in ("localhost:1", "127.0.0.1", "[::1]:8765"):
            assert ask(server, "/state", Host=host)[0] == 200, host
        for host in ("example.org", "localhost.example.org:80", "", "[", "127.0.0.1.example.org"):
            assert ask(server, "/state", Host=host)[0] == 421, host


def test_beyond_this_machine_every_request_needs_the_token(finished: tuple[Options, Path]) -> None:
    with served(finished[1], "0.0.0.0") as server:
        token = server.address.rstrip("/").rpartition("/")[2]
        assert len(token) >= 32
        for path in ("/", "/state", "/style.css", f"/{token[:-1]}/", f"/{token}", f"/{token}x/state", "/%00/"):
            assert ask(server, path)[0] == 403, path
        assert ask(server, f"/{token}/")[0] == ask(server, f"/{token}/state")[0] == 200
        assert ask(server, f"/{token}/", Host="example.org")[0] == 421
    with served(finished[1]) as server:
        assert not server.token


def test_what_cannot_be_watched_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no such directory") as missing:
        open_server(tmp_path / "later")
    assert f"watch the folder above, {tmp_path}" in str(missing.value)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a directory"):
        open_server(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1: not an address of this machine"):
        open_server(tmp_path, "192.0.2.1")
    with pytest.raises(ConfigError, match=r"--host nowhere\.invalid: not a name or address"):
        open_server(tmp_path, "nowhere.invalid")
    with served(tmp_path) as server:
        with pytest.raises(EnvironmentFault, match=f"port {server.server_port} is taken"):
            open_server(tmp_path, port=server.server_port)
        with pytest.raises(SystemExit) as end:
            run_command_line(["watch", str(tmp_path), "--port", str(server.server_port)])
    assert end.value.code == EnvironmentFault.exit_code
    assert "Name a free one with --port." in capsys.readouterr().err
