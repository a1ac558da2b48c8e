"""The journal, samples/groups_NNNNNN.jsonl: every group that was begun for a step, as it was generated and judged. From it a step can be
trained again exactly.

A line holds a group, with arrays as base64 of little-endian numbers: about 11 bytes a token. The worker that judged it writes the line.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlinf.data.group_file import put_together, take_apart
from rlinf.data.records import Group
from rlinf.errors import UserError

TYPES = {"prompt": "<i4", "token_ids": "<i4", "rollout_logprobs": "<f4", "loss_mask": "|u1"}  # by the last part of an array's name


def group_line(group: Group) -> str:
    about, arrays = take_apart(group)
    packed = {name: base64.b64encode(np.ascontiguousarray(a, dtype_of(name)).tobytes()).decode() for name, a in arrays.items()}
    return json.dumps(about | {"arrays": packed}, ensure_ascii=False)


def read_groups(path: Path) -> Iterator[Group]:
    """The groups in the order in which they were judged, without a torn last line. Raises UserError that names a damaged line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _group(line, f"{path}:{number}")


def _group(line: bytes, where: str) -> Group:
    try:
        row = json.loads(line.decode("utf-8"))
        return put_together(row, lambda name: np.frombuffer(base64.b64decode(row["arrays"][name]), dtype_of(name)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: is no group of a run ({error}); the file is damaged, and its step cannot be replayed") from error


def dtype_of(array: str) -> str:
    return TYPES[array.rpartition(".")[2]]
