"""Events of the SGLang server become samples: no token lost, none twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlinf.data.records import Finish
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.sglang_samples import arriving, body_of, noise_seed


def request(**changes: Any) -> GenerateRequest:
    given = {"n": 2, "sampling": SamplingParams(0.7), "stop": Stop(), "max_new_tokens": 10} | changes
    return GenerateRequest("r", np.array([5, 6, 7], np.int32), **given)


def event(
    ids: list[int], total: int, finish: dict[str, Any] | None = None, spans: list[tuple[int, int, int]] = (), repeated: int = 0
) -> dict[str, Any]:
    """As the server sends it; with `repeated`, log-probabilities of older tokens come along, as when a waiting sample is aborted."""
    meta = {
        "completion_tokens": total,
        "output_token_logprobs": [[-0.5 * t, t, None] for t in [0] * repeated + ids],
        "finish_reason": finish,
    }
    return {
        "output_ids": ids,
        "meta_info": meta | {"weight_versions": [{"version": str(v), "start": a, "end": b} for v, a, b in spans], "cached_tokens": 2},
    }


def test_tokens_and_versions_of_a_sample() -> None:
    sample = arriving(request(), 100)[1]
    assert [sample.take(event([1], 1)), sample.take(event([2, 3], 3))] == [1, 2]
    sample.take(event([4], 4, {"type": "stop", "matched": 4}, [(0, 0, 3), (1, 3, 4)]))
    done = sample.sample()
    assert (
        done.sample_id == "r/1"
        and done.token_ids.tolist() == [1, 2, 3, 4]
        and done.versions == ((0, 3), (1, 1))
        and done.finish is Finish.STOP
    )
    np.testing.assert_allclose(done.rollout_logprobs, [-0.5, -1, -1.5, -2])


def test_the_last_event_of_an_aborted_sample_repeats_a_token() -> None:
    sample = arriving(request(), 100)[0]
    sample.take(event([1, 2], 2))
    assert sample.take(event([2], 2, {"type": "abort", "message": "Abort in waiting queue"}, [(3, 0, 2)], repeated=1)) == 0
    assert sample.sample().token_ids.tolist() == [1, 2] and sample.sample().versions == ((3, 2),) and sample.finish is Finish.ABORT


ABORTED = {"type": "abort", "message": "Abort request"}


@pytest.mark.parametrize(
    ("ids", "changes", "context", "finish"),
    [
        ([1, 3], {"stop": Stop((3,))}, 100, Finish.STOP),
        ([3, 1], {"stop": Stop((3,))}, 100, Finish.ABORT),
        ([4, 5], {"stop": Stop((), ("c45",))}, 100, Finish.STOP),  # it began in the prefix
        ([4, 5], {"stop": Stop((), ("7",))}, 100, Finish.ABORT),  # a stop string in the prompt is none
        ([1] * 9, {}, 100, Finish.LENGTH),
        ([1] * 9, {}, 13, Finish.WINDOW),
        ([1] * 8, {}, 100, Finish.ABORT),
    ],
)
def test_an_aborted_sample_whose_last_token_ends_it_is_complete(
    ids: list[int], changes: dict[str, Any], context: int, finish: Finish
) -> None:
    """The server decodes one more token of what it is to abort, and does not look at it."""
    asked = request(n=1, prefixes=(np.array([12], np.int32),), max_new_tokens=10 if context == 100 else 50, **changes)
    (sample,) = arriving(asked, context)
    sample.take(event(ids, len(ids), ABORTED, [(0, 0, len(ids))]))
    sample.look_again(asked, lambda ids: "".join(f"{i:x}" for i in ids))
    assert sample.sample().finish is finish


@pytest.mark.parametrize(
    ("ids", "stop", "reason", "kept", "finish"),
    [
        ([4, 5, 6], "c4", "length", 1, Finish.STOP),  # it began in the prefix
        ([4, 5, 6], "456", "length", 3, Finish.STOP),  # in more tokens than SGLang's tokenizer has for it
        ([4, 5, 6, 4, 5], "45", "stop", 2, Finish.STOP),  # before the end that SGLang saw
        ([4, 5, 6], "56", "abort", 3, Finish.STOP),
        ([4, 5, 6], "7c", "length", 3, Finish.LENGTH),  # it began in the prompt
    ],
)
def test_a_stop_string_that_the_server_overlooks_ends_the_sample(ids: list[int], stop: str, reason: str, kept: int, finish: Finish) -> None:
    prefixes, stop_at = (np.array([12], np.int32),), Stop((), (stop, "never this"))
    asked = request(n=1, prefixes=prefixes, stop=stop_at, max_new_tokens=1 + len(ids))
    (sample,) = arriving(asked, 100)
    sample.take(event(ids, len(ids), {"type": reason}, [(0, 0, 2), (1, 2, len(ids))]))
    sample.look_again(asked, lambda ids: "".join(f"{i:x}" for i in ids))
    done = sample.sample()
    assert done.token_ids.tolist() == ids[:kept] and len(done.rollout_logprobs) == kept and done.finish is finish
    assert sum(n for _, n in done.versions) == kept


def test_an_aborted_sample_without_tokens_is_empty() -> None:
    done = arriving(request(), 100)[0].sample()
    assert len(done) == 0 and done.versions == () and done.finish is Finish.ABORT


def test_lost_tokens_and_errors_of_the_server_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="r/0: 1 tokens and 1 log-probabilities arrived of 3"):
        arriving(request(), 100)[0].take(event([9], 3))
    with pytest.raises(RuntimeError, match="r/0: SGLang ended it after 2 of 10 tokens"):
        arriving(request(), 100)[0].take(event([8, 9], 2, {"type": "length", "length": 10}, [(0, 0, 2)]))
    with pytest.raises(RuntimeError, match="r/0: SGLang gave up: out of memory"):
        arriving(request(), 100)[0].take(event([], 0, {"type": "abort", "message": "out of memory", "status_code": 500}))


@pytest.mark.parametrize(("context", "room", "finish"), [(8, 5, Finish.WINDOW), (13, 10, Finish.LENGTH)])
def test_the_window_limits_a_sample(context: int, room: int, finish: Finish) -> None:
    sample = arriving(request(), context)[0]
    sample.take(event(list(range(room)), room, {"type": "length", "length": room}, [(0, 0, room)]))
    assert sample.room == room and sample.finish is finish


def test_what_the_server_is_asked() -> None:
    prefixes = (np.array([8], np.int32), np.zeros(0, np.int32))
    asked = request(stop=Stop((3,), ("end",)), sampling=SamplingParams(1.0, 0.9, 0), prefixes=prefixes)
    samples = arriving(asked, 100)
    body = body_of(asked, samples, seed=None, vocab=100)
    assert body["input_ids"] == [[5, 6, 7, 8], [5, 6, 7]] and body["rid"] == [a.rid for a in samples]
    first = body["sampling_params"][0]
    assert (first["top_p"], first["top_k"], first["ignore_eos"], first["stop_token_ids"], first["stop"]) == (0.9, -1, False, [3], ["end"])
    assert "sampling_seed" not in first and body_of(request(), samples, None, 100)["sampling_params"][0]["ignore_eos"]
    seeds = [p["sampling_seed"] for p in body_of(asked, samples, seed=7, vocab=100)["sampling_params"]]
    assert seeds == [noise_seed(7, "r/0"), noise_seed(7, "r/1")] and len({*seeds, noise_seed(8, "r/0")}) == 3
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(("top_k", "told"), [(0, -1), (1, 1), (99, 99), (100, -1), (1_000_000, -1)])
def test_a_top_k_that_cuts_nothing_is_none(top_k: int, told: int) -> None:
    """SGLang takes a slower way to sample for any other."""
    asked = request(sampling=SamplingParams(1.0, 1.0, top_k))
    assert {p["top_k"] for p in body_of(asked, arriving(asked, 100), None, vocab=100)["sampling_params"]} == {told}
