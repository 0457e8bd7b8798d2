"""A real Slurm cluster of two nodes on this machine, for the tests: Debian's slurm-wlm and munge.

Its state, its ports, its munge socket and key are its own, so that several clusters, or a real one, do not meet.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "squeue", "scontrol")
NODES = ("n1", "n2")
KILL_WAIT = 5
"""Seconds between SIGTERM and SIGKILL, by which srun ends the other ranks when it sees one go."""

CONF = """\
ClusterName=dpt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait={kill_wait}
TmpFS={root}/tmp-%n
PriorityType=priority/basic
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName={node_1} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port_1}
NodeName={node_2} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port_2}
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=DEFAULT Nodes={node_1},{node_2} MaxTime=INFINITE State=UP GraceTime=30
PartitionName=all Default=YES
PartitionName=urgent PriorityTier=2
"""
GRES = """\
NodeName={node_1},{node_2} Name=gpu File=/dev/zero
NodeName={node_1},{node_2} Name=gpu File=/dev/full
"""
# Devices that every machine has: Slurm counts them, and tells each job which ones are its own.
#
# The names n1 and n2 resolve nowhere: the ranks must ask Slurm for NodeAddr, as on clusters without DNS. A job that is
# queued again waits for cred_expire seconds, 120 where nothing is said.


def missing_programs() -> list[str]:
    """What of Slurm and munge is not installed here."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


@dataclass(frozen=True)
class Cluster:
    """A running cluster: `sbatch`, `scontrol` ... by `run`."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need, without what this process was itself started with."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI"))}
        return kept | {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": _path()}

    def run(
        self, *command: object, timeout: float = 60, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        variables = self.environment | dict(environment or {})
        return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=timeout, check=False)

    def submit(self, *arguments: object, environment: Mapping[str, str] | None = None) -> str:
        """The id of a submitted job."""
        done = self.run("sbatch", "--parsable", *arguments, environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, Reason ..."""
        told = self.run("scontrol", "-o", "show", "job", job).stdout
        return {word.partition("=")[0]: word.partition("=")[2] for word in told.split() if "=" in word}

    def wait(self, job: str, *states: str, timeout: float = 240) -> str:
        """Wait until the job is in one of `states`, or at its end; returns the state."""
        until = time.monotonic() + timeout
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        while True:
            facts = self.facts(job)
            state = facts.get("JobState", "UNKNOWN")
            if state in states or state in ends:
                return state
            assert time.monotonic() < until, f"job {job} is still {state}: {facts.get('Reason')}"
            time.sleep(0.3)


@contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Two nodes with four slots each; ends with every daemon and every job's process gone."""
    for name in ("munge", "state", "spool-n1", "spool-n2", "tmp-n1", "tmp-n2"):
        (root / name).mkdir(parents=True)
    (root / "munge").chmod(0o700)
    key = root / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller, port_1, port_2 = _free_ports(3)
    (root / "slurm.conf").write_text(
        CONF.format(
            root=root,
            host=socket.gethostname(),
            user=pwd.getpwuid(os.getuid()).pw_name,
            controller=controller,
            kill_wait=KILL_WAIT,
            port_1=port_1,
            port_2=port_2,
            node_1=NODES[0],
            node_2=NODES[1],
        )
    )
    (root / "gres.conf").write_text(GRES.format(node_1=NODES[0], node_2=NODES[1]))
    (root / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
    munge = root / "munge"
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}",
         f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]  # fmt: skip
    running = Cluster(root)
    with ExitStack() as stack:
        for command in commands:
            name = "-".join(word for word in command if not word.startswith("-"))
            log = stack.enter_context((root / f"{name}.out").open("w"))
            daemon = subprocess.Popen(command, env=running.environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_end, daemon)
            if command[0] == "munged":
                _wait_for((munge / "socket").exists, "munged's socket", root)
        _wait_for(lambda: _idle(running) == len(NODES), "two idle nodes", root)
        try:
            yield running
        finally:
            user = pwd.getpwuid(os.getuid()).pw_name
            running.run("scancel", "--full", "--signal=KILL", "--user", user)
            running.run("scancel", "--user", user)  # those that wait
            _wait_for(lambda: not running.run("squeue", "-h").stdout.strip(), "an empty queue", root)


def _idle(running: Cluster) -> int:
    told = running.run("scontrol", "-o", "show", "node").stdout
    return sum("State=IDLE " in line for line in told.splitlines())


def _wait_for(condition: object, name: str, root: Path, seconds: float = 60) -> None:
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            files = [*root.glob("*.out"), *root.glob("*.log")]
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in files)
            raise AssertionError(f"waited {seconds:g} s for {name}.\n{logs}")
        time.sleep(0.2)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]


def _path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/bin"
