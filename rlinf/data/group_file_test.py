"""What is written of a group comes back, to the bit; a damaged file is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

from rlinf.data.group_file import header_from_json, read_group, write_group
from rlinf.data.records import Finish, Group, Prompt, Sample, Status, Verdict
from rlinf.errors import UserError


def make(verdicts: bool = True) -> Group:
    prompt = Prompt("p/1", np.arange(3, dtype=np.int32), "math", ("1", "\\frac{1}{2}"), "What is 1?", "some", {"level": 3})
    first = Sample(
        "4.p/1/0",
        np.array([7, 8], np.int32),
        np.array([-0.1, np.nan], np.float32),
        np.array([1, 0], np.uint8),
        ((3, 1), (4, 1)),
        Finish.STOP,
    )
    empty = Sample("4.p/1/1", np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.uint8), (), Finish.ABORT)
    judged = (Verdict(5.0, Status.RIGHT, "1", "exact", 0.25, parts=(("format", 0.5),)), None)
    return Group("4.p/1", prompt, (first, empty), judged if verdicts else ())


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, tuple):
        return type(b) is tuple and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("verdicts", [True, False])
def test_a_group_comes_back(tmp_path: Path, verdicts: bool) -> None:
    path = tmp_path / "new" / "0.safetensors"
    write_group(path, make(verdicts))
    assert same(read_group(path), make(verdicts)) and read_group(path).header() == make(verdicts).header()
    assert not same(read_group(path), make(not verdicts))
    header = make(verdicts).header()
    assert same(header_from_json(json.loads(json.dumps(asdict(header)))), header)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    with pytest.raises(UserError, match="0.safetensors"):
        read_group(path)
    write_group(path, make())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="0.safetensors.*damaged"):
        read_group(path)
