"""What all tests share. Tests marked gpu are skipped, with the reason, on machines without a CUDA device."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy one takes seconds for what is no work
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--begin-until", type=float, help="slow tests whose turn comes after this moment (seconds since 1970) are skipped")
    parser.addoption("--order", help="a word that shuffles the files: who has no time for all of them sees others under another word")


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; the runs that tests interrupt would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path in slow)  # a mistake shows in a fast file first
    if order := config.getoption("order"):
        files = [*dict.fromkeys(item.path for item in items)]
        random.Random(order).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))
    if Path("/dev/nvidiactl").exists() or "RLINF_PRETEND_GPU" in os.environ:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("begin_until")
    if until is not None and time.time() > until and item.get_closest_marker("slow"):
        pytest.skip("its turn did not come in the time that was given (--begin-until)")
