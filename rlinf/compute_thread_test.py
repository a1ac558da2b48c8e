"""One thread for each component, or one for all of them."""

from __future__ import annotations

import threading

import pytest

from rlinf.compute_thread import common_thread, compute_thread


def where(name: str) -> int:
    return compute_thread(name).submit(threading.get_ident).result()


def test_components_have_threads_of_their_own_unless_they_take_turns() -> None:
    assert where("actor") != where("engine")
    with common_thread():
        assert where("actor") == where("engine")
        engine = compute_thread("engine")
        engine.shutdown(wait=True)
        assert engine.submit(lambda: 1).result() == 1  # others may still need it
        with pytest.raises(RuntimeError, match="already"), common_thread():
            pass
    assert where("actor") != where("engine")
