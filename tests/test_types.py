"""What rlinf's code declares of types is true: mypy finds nothing (mypy.ini)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Kept from one run to the next, because mypy takes a minute and a half of one core for what torch declares, and 3 s when it knows that. It
# looks at the contents of each file, so that a checkout may use what another one left.
CACHE = Path(os.environ.get("RLINF_CACHE") or "~/.cache/rlinf").expanduser() / "mypy"


@pytest.mark.timeout(600)  # without the cache
def test_declared_types_are_true() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", str(CACHE)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
