"""Which machine, which software, which commit: needs nothing but Python, for machines that lack torch."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def said(command: Sequence[str], seconds: float = 30.0) -> str | None:
    """What a program printed on stdout; nothing if it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """Of the checkout, with `-dirty` where tracked files differ from it."""
    return said(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])


def processor() -> str:
    """The processor's name, as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
