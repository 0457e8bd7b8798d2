"""What went wrong in a run, as it left it: the error that ended it, and the steps that were skipped."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpt_hpc.report.wording import moment

ERROR_LOG = "error.log"
DIVERGED = "diverged.json"
TAIL = 1 << 15
"""Bytes at the end of error.log in which its last error is looked for."""
SHOWN = 10
"""Skipped steps, and structures of each, that are named."""

HEAD = re.compile(r"^(\d{4}-\d\d-\d\dT\S+) (.*)$", flags=re.MULTILINE)


def last_error(run_dir: Path) -> dict[str, Any] | None:
    """The last error in error.log: its time and place, its message, and the traceback; None if there is none."""
    try:
        with (run_dir / ERROR_LOG).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    heads = list(HEAD.finditer(text))
    time, place, body = "", "an unknown place", text
    if heads:
        (time, place), body = heads[-1].groups(), text[heads[-1].end() :]
    return {"time": moment(time), "place": place, "message": _message(body), "traceback": body.strip()}


def _message(body: str) -> str:
    """What a traceback says below its last frame."""
    lines = body.strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    below = lines[frames[-1] + 1 :] if frames else lines
    while len(below) > 1 and below[0].startswith("    "):
        below = below[1:]
    return "\n".join(below).strip()


def skipped_steps(run_dir: Path) -> list[str]:
    """The last steps whose loss or gradient was not finite, in words, newest first."""
    steps: list[Any] = []
    with suppress(OSError, ValueError, TypeError, KeyError):
        steps = json.loads((run_dir / DIVERGED).read_text(encoding="utf-8"))["steps"]
    return [_in_words(step) for step in reversed(steps[-SHOWN:]) if isinstance(step, dict)]


def _in_words(step: dict[str, Any]) -> str:
    names = [str(name) for share in step.get("ranks") or () for name in share.get("structures") or ()]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    numbers = f"loss {step.get('loss')}, gradient norm {step.get('grad_norm')}"
    where = f"Epoch {step.get('epoch')}, step {step.get('step')}"
    return f"{where}: {numbers}. Structures: {', '.join(names[:SHOWN])}{more}"
