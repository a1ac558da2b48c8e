"""The benchmarks of speed: what they make of measurements, and that what they have kept says what its numbers say."""

from __future__ import annotations

import copy
import json
from statistics import median
from typing import Any

import numpy as np
import pytest

from benchmarks import rollout_engine, vs_trl, weight_sync

STEP = {"seconds": 2.0, "prompt_tokens": [75], "response_tokens": [20], "samples": 64, "peak_pss_bytes": 2**30}


class Letters:
    """A tokenizer whose tokens are characters, but for `=`, which it drops at the start of a text."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text.removeprefix("=")]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_prompts_are_cut_to_the_asked_tokens_and_stay_so() -> None:
    rows = [
        {"prompt": "x" * before + mark + "y" * 74, "task": "math", "query_id": f"{before}{mark}", "solutions": ["1"]}
        for before, mark in ((5, "="), (9, "a"), (0, "b"))
    ]
    first, second = vs_trl.cut_prompts(rows, Letters(), 2)  # type: ignore[arg-type]
    assert (first["query_id"], first["prompt"]) == ("9a", "a" + "y" * 74) and second["query_id"] == "0b"
    with pytest.raises(SystemExit, match="only 2 of 3 prompts"):
        vs_trl.cut_prompts(rows, Letters(), 3)  # type: ignore[arg-type]


def test_faster_and_smaller_is_what_counts() -> None:
    def found(trl: float, gib: float) -> dict[str, Any]:
        theirs = [STEP | {"seconds": s, "peak_pss_bytes": int(gib * 2**30)} for s in (trl, trl + 50, trl - 1)]
        return vs_trl.judge({"trl": theirs, "rlinf": [STEP] * 3}, 20)

    good = found(6.0, 1.5)
    assert (good["faster"], good["reached"], good["peak_gib"]) == (3.0, True, {"trl": 1.5, "rlinf": 1.0})
    assert good["new_tokens_per_second"] == {"trl": 64 * 20 / 6, "rlinf": 640.0}
    assert not found(5.9, 1.5)["reached"] and not found(60.0, 0.9)["reached"]


@pytest.mark.parametrize("other", [{"response_tokens": [19, 20]}, {"prompt_tokens": [84]}, {"samples": 56}])
def test_a_side_that_did_less_is_not_compared(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trl did other work"):
        vs_trl.judge({"trl": [STEP | other], "rlinf": [STEP]}, 20)


def test_the_share_of_memcpy_is_by_the_faster_copy_of_the_moment() -> None:
    seconds = [{"publish": 0.01, "way": 0.0125, "load": 0.02, "sync": s} for s in (0.04, 0.05, 0.02)]
    copies = [{"one_thread": 10.0, "all_threads": 8.0}, {"one_thread": 4.0, "all_threads": 10.0}, {"one_thread": 10.0, "all_threads": 10.0}]
    found = weight_sync.verdict(10**8, seconds, copies)  # 2.5, 2 and 5 GB/s of 10
    assert found["share_of_memcpy"] == pytest.approx(0.25) and not found["reached"]
    assert found["way_share_of_memcpy"] == pytest.approx(0.8)
    assert (
        found["gb_per_second"] == pytest.approx({"publish": 10.0, "way": 8.0, "load": 5.0, "sync": 2.5})
        and found["memcpy_gb_per_second"]["one_thread"] == 10.0
    )
    assert weight_sync.verdict(2 * 10**8, seconds, copies)["reached"]


def test_the_cases_of_the_engine_are_those_of_the_claim() -> None:
    equal, tail, group = (rollout_engine.make_case(name, 1000, 1) for name in rollout_engine.AIMS)
    assert (len(equal.prompts), set(equal.lengths), equal.batch) == (32, {32}, 32)
    assert max(tail.lengths) > 7.5 * median(tail.lengths) and (len(tail.lengths), tail.batch) == (64, 32)
    assert ({len(p) for p in group.prompts}, group.n, len(group.prompts)) == ({75}, 8, 8)
    assert not np.array_equal(equal.prompts[0], rollout_engine.make_case("equal", 1000, 2).prompts[0])


def test_the_kept_verdicts_follow_from_the_kept_numbers() -> None:
    kept = json.loads(vs_trl.RESULTS.read_text())
    assert "20" in kept["cases"]
    for tokens, case in kept["cases"].items():
        again = vs_trl.judge(case["steps"], int(tokens.split(",")[0]))
        assert {name: case[name] for name in again} == again
    for kept in json.loads(weight_sync.RESULTS.read_text())["cases"].values():
        again = weight_sync.verdict(kept["bytes"], kept["seconds"], kept["copies"])
        assert {name: kept[name] for name in again} == again
    spoiled = copy.deepcopy(kept["seconds"])
    for s in spoiled:
        s["sync"] /= 2
    assert weight_sync.verdict(kept["bytes"], spoiled, kept["copies"])["share_of_memcpy"] == pytest.approx(2 * kept["share_of_memcpy"])
    kept = json.loads(rollout_engine.RESULTS.read_text())
    assert set(kept["cases"]) >= set(rollout_engine.AIMS)
    for name, case in kept["cases"].items():
        again = rollout_engine.verdict(name.split(",")[0], case["engine_tokens_per_second"], case["transformers_tokens_per_second"])
        assert {key: case[key] for key in again} == again
