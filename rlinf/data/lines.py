"""Appends lines to a file that several processes write."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append all lines in one write, so that lines of several writers do not mix. Makes the folder.

    Raises OSError that names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(fd, data) < len(data):  # on a full disk the kernel writes what fits, and reports no error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:  # errors of a descriptor do not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
