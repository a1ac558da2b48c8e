"""A key that nothing reads is a defect."""

from __future__ import annotations

import re
from pathlib import Path

from rlinf.config.keys import known_keys

ROOT = Path(__file__).resolve().parent.parent
ONE_VALUE = {"algorithm.sampling_params.do_sample"}  # recipes name it; false is refused, true is what is done


def test_every_key_is_read_by_some_code_outside_config() -> None:
    files = [p for p in (ROOT / "rlinf").rglob("*.py") if not p.name.endswith("_test.py") and p.parent.name != "config"]
    read = set(re.findall(r"\.([a-z_0-9]+)", "\n".join(p.read_text() for p in files)))
    unread = [name for name in known_keys() if name.rpartition(".")[2] not in read]
    assert {*unread} == ONE_VALUE
