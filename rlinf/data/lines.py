"""JSON lines that several processes write into one file."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append all lines in one write, so that those of several writers do not mix; the folder is made.

    Raises OSError that names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(fd, data) < len(data):  # the kernel writes what still fits, and calls it no error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:  # a descriptor has no name: say which file the full disk is about
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
