"""Turns the errors that a full disk causes into one message: which folder, which disk, what to do.

Without it, the error would look like the fault of whatever happened to write last.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlinf.errors import Hang, RunFailed, UserError

FULL = os.strerror(errno.ENOSPC)  # the kernel's words, which every library repeats in its own error
LITTLE = 16 << 20  # bytes: a disk that refuses a write hardly has more left


class DiskFull(RunFailed):
    """Its message is complete: it needs no further explanation."""


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn an error of the block into a DiskFull, if it comes from the full disk of a run's folder; let any other pass."""
    try:
        yield
    except (Hang, DiskFull):
        raise
    except (OSError, RunFailed, UserError) as error:
        if FULL not in str(error) or not folder.exists() or (free := shutil.disk_usage(folder).free) > LITTLE:
            raise
        raise DiskFull(
            f"the disk of {folder} is full ({free / 2**20:.1f} MiB are left at {mount_of(folder)}). Make room there, then go on from the "
            "latest complete checkpoint with runner.resume_dir=auto. Less is kept with runner.keep_checkpoints and runner.keep_groups; "
            f"runner.output_dir is another place for another run.\nWhat could not be written: {str(error).splitlines()[0]}"
        ) from error


def mount_of(folder: Path) -> Path:
    """The mount point of the disk that the folder is on."""
    return next(path for path in (folder, *folder.parents) if path.is_mount())
