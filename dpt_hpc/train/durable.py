"""Files that a power cut leaves as they were or as they are meant to be, and never empty under their names."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """See a file, or the entries of a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_file(temporary: Path, path: Path) -> None:
    """Rename a whole file to `path`, beside it, once its content is on the disk: its name could be first."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)
