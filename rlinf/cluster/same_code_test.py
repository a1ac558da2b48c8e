from __future__ import annotations

import time
from pathlib import Path

from rlinf.cluster.same_code import OURS, differences, own_code, source_digest

DRIVER = {OURS: "abc", "torch": "2.13.0", "megatron-core": "0.16.1", "sglang": "0.5.21", "transformers": "5.12.1"}


def test_a_wheel_and_a_checkout_of_the_same_files_are_the_same(tmp_path: Path) -> None:
    """A wheel has no test beside its code that the checkout might have, compiled files instead, and lies elsewhere."""
    for name, folder in (("checkout", "rlinf"), ("wheel", "site-packages/rlinf")):
        (tmp_path / name / folder / "b").mkdir(parents=True)
        for file, text in (("b/two.py", "2"), ("one.py", "1"), ("one_test.py", name), (f"__pycache__/{name}.pyc", name)):
            (tmp_path / name / folder / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / folder / file).write_text(text)
    wheel = tmp_path / "wheel" / "site-packages" / "rlinf"
    before = source_digest(wheel)
    assert source_digest(tmp_path / "checkout" / "rlinf") == before
    (wheel / "b" / "two.py").rename(wheel / "two.py")
    assert source_digest(wheel) != before
    (wheel / "two.py").rename(wheel / "b" / "two.py")
    (wheel / "one.py").write_text("another")
    assert source_digest(wheel) != before


def test_a_digest_is_quick_and_made_once() -> None:
    own_code.cache_clear()
    started = time.process_time()
    found = own_code()
    assert time.process_time() - started < 0.5  # ten times what it takes, on a machine that does other things
    assert own_code() is found and set(found) == set(DRIVER)


def test_what_differs_is_named_with_both_sides() -> None:
    assert differences(DRIVER, dict(DRIVER), "node 1") is None
    text = differences(DRIVER, DRIVER | {OURS: "xyz", "torch": "2.12.0"}, "actor rank 3 on node 1 (10.0.0.2)")
    assert text is not None and text.startswith(
        "actor rank 3 on node 1 (10.0.0.2) runs other code than the driver (rlinf's files: the driver has abc, this node has xyz; "
        "torch: the driver has 2.13.0, this node has 2.12.0). Install the same on every node"
    )
