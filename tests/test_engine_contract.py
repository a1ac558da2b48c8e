"""What every rollout engine must do, asked of the engines in ENGINES; a capability that an engine lacks is skipped by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.data.records import Finish, Sample
from rlinf.data.tokenizer import load_tokenizer
from rlinf.errors import RunFailed
from rlinf.rollout.contract import GenerateRequest, GroupMember, RolloutEngine, SamplingParams, Stop
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.rollout.sglang_engine import SGLangEngine
from rlinf.weights.broadcast import open_store
from rlinf.weights.buckets import Named
from rlinf.weights.device_ipc import DeviceBuckets
from rlinf.weights.receipts import check_receipts, merge_sources
from rlinf.weights.routes import BROADCAST, BroadcastGroup, Feed, broadcast_groups
from rlinf.weights.server_groups import ServerWire
from rlinf.weights.shared_memory import SharedMemoryPublisher
from rlinf.weights.source import Broadcast, Collective, Disk, Receipt
from rlinf.weights.tensor_folder import open_hf_folder
from tests.sglang_here import needs_sglang, small_server
from tests.tiny import FAMILIES, make_tiny_model

CONTEXT = 96
GREEDY = SamplingParams(temperature=0)
NEVER = Stop()


def embedded(model_dir: Path, slots: int = 4, seed: int = 7) -> EmbeddedEngine:
    decode = load_tokenizer(str(model_dir)).decode
    return EmbeddedEngine(str(model_dir), dtype="fp32", slots=slots, max_context=CONTEXT, seed=seed, decode=decode)


def sglang(model_dir: Path) -> SGLangEngine:
    return small_server(model_dir, CONTEXT)


ENGINES = [pytest.param(embedded, id="embedded"), pytest.param(sglang, id="sglang", marks=needs_sglang)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: make_tiny_model(folder / family, family) for family in FAMILIES}
    return made | {"other": make_tiny_model(folder / "other", "qwen2", seed=1)}


@pytest.fixture(scope="module")
def sglang_engine(models: dict[str, Path]) -> Iterator[SGLangEngine]:
    """One server for all tests: it takes long to start."""
    made = sglang(models["qwen2"])
    yield made
    made.close()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[RolloutEngine]:
    if request.param is embedded:
        made = embedded(models["qwen2"])
        yield made
        made.close()
    else:
        server = request.getfixturevalue("sglang_engine")
        asyncio.run(server.load_weights(Disk(str(models["qwen2"])), 0))
        server.stats()
        yield server


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, length).astype(np.int32)


def ask(
    name: str, ids: np.ndarray, n: int = 1, *, sampling: SamplingParams = SamplingParams(), stop: Stop = NEVER, new: int = 12,
    prefixes: tuple[np.ndarray, ...] = (), indices: tuple[int, ...] = (),
) -> GenerateRequest:  # fmt: skip
    return GenerateRequest(name, ids, n, sampling, stop, new, prefixes, indices)


async def collect(engine: RolloutEngine, request: GenerateRequest) -> list[Sample]:
    """The samples of a request, in the order of their index."""
    return sorted([s async for s in engine.generate(request)], key=lambda s: int(s.sample_id.rsplit("/")[-1]))


def run(engine: RolloutEngine, *requests: GenerateRequest) -> list[list[Sample]]:
    async def together() -> list[list[Sample]]:
        return await asyncio.gather(*(collect(engine, r) for r in requests))

    return asyncio.run(together())


async def until_decoding(engine: RolloutEngine) -> int:
    """Wait for the first decoded tokens; how many there are."""
    while not (decoded := engine.stats().decoded_tokens):
        await asyncio.sleep(0.002)
    return decoded


def repeatable(engine: RolloutEngine) -> SamplingParams:
    """Sampling that gives the same tokens when asked again."""
    return SamplingParams() if engine.capabilities.seeded else GREEDY


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [s.token_ids.tolist() for s in samples]


class Reference:
    """transformers, on the same folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)

    @torch.no_grad()
    def logprobs(self, ids: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """[n - 1, V]: the distribution of each next token."""
        logits = self.model(torch.tensor(ids[None].astype(np.int64))).logits[0, :-1]
        return torch.log_softmax(logits.float() / temperature, -1).numpy()

    def greedy(self, ids: np.ndarray, new: int) -> list[int]:
        whole = ids
        for _ in range(new):
            whole = np.append(whole, self.logprobs(np.append(whole, 0))[-1].argmax())
        return whole[len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", ENGINES)
def test_greedy_tokens_and_logprobs_equal_transformers(make, family: str, models: dict[str, Path], request: pytest.FixtureRequest) -> None:
    shared = make is sglang and family == "qwen2"  # the server that the other tests have
    engine = request.getfixturevalue("sglang_engine") if shared else make(models[family])
    reference = Reference(models[family])
    if shared:
        asyncio.run(engine.load_weights(Disk(str(models[family])), 0))
    prompts = [prompt(n, n) for n in (1, 2, 9, 30)]
    prompts.append(np.concatenate([prompts[3][:20], prompt(5, 99)]))  # shares 20 tokens with another prompt
    answers = run(engine, *(ask(f"r{i}", ids, 2, sampling=GREEDY) for i, ids in enumerate(prompts)))
    sampled = run(engine, *(ask(f"s{i}", ids, 2, sampling=SamplingParams(0.7)) for i, ids in enumerate(prompts)))
    for ids, greedy, drawn in zip(prompts, answers, sampled):
        expected = reference.greedy(ids, 12)
        assert tokens(greedy) == [expected, expected]
        for sample, temperature in ((greedy[0], 1.0), (drawn[0], 0.7), (drawn[1], 0.7)):
            whole = np.concatenate([ids, sample.token_ids])
            truth = np.take_along_axis(reference.logprobs(whole, temperature), whole[1:, None].astype(np.int64), 1)[:, 0]
            np.testing.assert_allclose(sample.rollout_logprobs, truth[len(ids) - 1 :], atol=1e-4)
            if temperature == 1.0:
                np.testing.assert_allclose(asyncio.run(engine.sequence_logprobs([whole]))[0], truth, atol=1e-4)
    if not shared:
        engine.close()


def test_noise_does_not_depend_on_batching_slots_or_order(engine: RolloutEngine, models: dict[str, Path]) -> None:
    if not engine.capabilities.seeded:
        pytest.skip("the engine is not seeded")
    requests = [ask(f"r{i}", prompt(5 + 3 * i, i), 3, new=5 + 4 * i) for i in range(4)]
    together = run(engine, *requests)
    backwards = run(engine, *reversed(requests))[::-1]
    alone = [run(engine, r)[0] for r in requests]
    wide = embedded(models["qwen2"], slots=16)
    one = embedded(models["qwen2"], slots=1)
    for other in (backwards, alone, run(wide, *requests), run(one, *requests)):
        assert [tokens(s) for s in other] == [tokens(s) for s in together]
    assert len({tuple(t) for t in tokens(together[3])}) == 3  # and the samples of one prompt differ
    other_seed = embedded(models["qwen2"], seed=8)
    assert tokens(run(other_seed, requests[3])[0]) != tokens(together[3])
    for made in (wide, one, other_seed):
        made.close()


@pytest.mark.parametrize(
    "sampling", [SamplingParams(0.8, top_k=3), SamplingParams(1.3, top_p=0.3), SamplingParams(0.9, top_p=0.2, top_k=40)], ids=str
)
def test_truncated_sampling_stays_inside_and_reports_the_whole_distribution(
    engine: RolloutEngine, models: dict[str, Path], sampling: SamplingParams
) -> None:
    """Every token is among the top-k, and in the nucleus (those before it hold less than top-p); not all are the likeliest; its
    log-probability is of softmax(logits / temperature) before any cut."""
    reference, ids = Reference(models["qwen2"]), prompt(9)
    first = 0
    for sample in run(engine, ask("t", ids, 4, sampling=sampling, new=60))[0]:
        whole = np.concatenate([ids, sample.token_ids])
        logprobs = reference.logprobs(whole, sampling.temperature)[len(ids) - 1 :]
        chosen = np.take_along_axis(logprobs, sample.token_ids[:, None].astype(np.int64), 1)[:, 0]
        np.testing.assert_allclose(sample.rollout_logprobs, chosen, atol=1e-4)
        likelier = logprobs > chosen[:, None] + 1e-4
        assert (likelier.sum(1) < (sampling.top_k if sampling.top_k > 0 else logprobs.shape[1])).all()
        assert ((np.exp(logprobs) * likelier).sum(1) < sampling.top_p + 1e-3).all()
        first += (likelier.sum(1) == 0).sum()
    assert 0 < first < 4 * 60


def test_more_samples_than_slots(engine: RolloutEngine) -> None:
    samples = run(engine, ask("many", prompt(6), 19, new=7))[0]
    assert [s.sample_id for s in samples] == [f"many/{k}" for k in range(19)]
    assert {s.finish for s in samples} == {Finish.LENGTH} and {len(s) for s in samples} == {7}
    assert all(s.versions == ((0, 7),) and s.loss_mask.all() and np.isfinite(s.rollout_logprobs).all() for s in samples)
    assert engine.stats().decoded_tokens == 19 * 7


def test_prompt_is_computed_once_for_its_samples(engine: RolloutEngine) -> None:
    run(engine, ask("group", prompt(40), 8, new=4))
    stats = engine.stats()
    again = 0 if isinstance(engine, EmbeddedEngine) else 7  # SGLang computes the last token of a stored prompt again, for its logits
    assert stats.prefilled_tokens == 40 + again and stats.reused_tokens == 7 * 40 - again


def test_common_prefix_of_prompts_is_computed_once(engine: RolloutEngine) -> None:
    if isinstance(engine, SGLangEngine):
        pytest.skip("SGLang shares what is stored, but does not wait for a prompt of another request that is just being computed")
    shared = prompt(40)
    run(engine, *(ask(f"r{i}", np.concatenate([shared, prompt(8, i + 1)]), 1, new=2) for i in range(4)))
    assert engine.stats().prefilled_tokens == 40 + 4 * 8


@pytest.mark.parametrize(
    "ids", [np.zeros(0, np.int32), prompt(CONTEXT), np.array([5, 320], np.int32)], ids=["empty", "over-long", "outside"]
)
def test_unusable_prompts_are_refused_by_name(engine: RolloutEngine, ids: np.ndarray) -> None:
    with pytest.raises(ValueError, match="request bad"):
        run(engine, ask("bad", ids))
    assert len(run(engine, ask("good", prompt(5)))[0]) == 1  # and the engine lives on


def test_end_token_belongs_to_the_sample(engine: RolloutEngine) -> None:
    again = repeatable(engine)
    free = tokens(run(engine, ask("r", prompt(8), sampling=again, new=30))[0])[0]
    end = free[10]
    assert 256 not in free
    stopped = run(engine, ask("r", prompt(8), sampling=again, new=30, stop=Stop(token_ids=(end, 256))))[0][0]  # 256: the model's own end
    assert stopped.token_ids.tolist() == free[: free.index(end) + 1] and stopped.finish is Finish.STOP


def readable_pair(engine: RolloutEngine, models: dict[str, Path]) -> tuple[np.ndarray, list[int], int, str]:
    """A prompt whose response has two readable characters in a row: (prompt, response, tokens up to the second character, the two)."""
    decode = load_tokenizer(str(models["qwen2"])).decode
    for seed in range(20):
        letters = prompt(9, seed)
        free = tokens(run(engine, ask("r", letters, sampling=repeatable(engine), new=60))[0])[0]
        clean = next((i for i in range(1, 60) if decode(free[i : i + 2]).isascii() and len(decode(free[i : i + 2]).strip()) == 2), None)
        if clean is not None:
            break
    string = decode(free[clean : clean + 2])
    return letters, free, next(i for i in range(60) if string in decode(free[: i + 1])) + 1, string


def test_stop_string_ends_with_the_token_that_completes_it(engine: RolloutEngine, models: dict[str, Path]) -> None:
    letters, free, end, string = readable_pair(engine, models)
    stop = Stop(strings=("never this", string))
    stopped = run(engine, ask("r", letters, sampling=repeatable(engine), new=60, stop=stop))[0][0]
    assert stopped.token_ids.tolist() == free[:end] and stopped.finish is Finish.STOP


def test_stop_string_that_begins_in_the_prefix_ends_the_sample(engine: RolloutEngine, models: dict[str, Path]) -> None:
    letters, free, end, string = readable_pair(engine, models)
    prefix = np.array(free[: end - 1], np.int32)
    asked = ask("r", letters, sampling=repeatable(engine), new=60, stop=Stop(strings=(string,)), prefixes=(prefix,))
    (stopped,) = run(engine, asked)[0]
    assert stopped.token_ids.tolist() == [free[end - 1]] and stopped.finish is Finish.STOP and stopped.versions == ((0, 1),)


def test_length_and_window_finishes(engine: RolloutEngine) -> None:
    room = CONTEXT - 80
    long, short = run(engine, ask("long", prompt(80), new=1000), ask("short", prompt(80), new=room - 1))
    assert long[0].finish is Finish.WINDOW and len(long[0]) == room
    assert short[0].finish is Finish.LENGTH and len(short[0]) == room - 1


def test_abort_loses_no_token(engine: RolloutEngine) -> None:
    again = repeatable(engine)
    whole = run(engine, ask("a", prompt(8), 6, sampling=again, new=80), ask("b", prompt(9, 1), 2, sampling=again, new=40))
    engine.stats()

    async def interrupted() -> tuple[int, list[Sample], list[Sample]]:
        a = asyncio.create_task(collect(engine, ask("a", prompt(8), 6, sampling=again, new=80)))
        b = asyncio.create_task(collect(engine, ask("b", prompt(9, 1), 2, sampling=again, new=40)))
        decoded = await until_decoding(engine)
        await engine.abort(["a"])
        return decoded, await a, await b

    decoded, partial, untouched = asyncio.run(interrupted())
    assert tokens(untouched) == tokens(whole[1])
    assert {s.finish for s in partial} <= {Finish.ABORT, Finish.LENGTH} and Finish.ABORT in {s.finish for s in partial}
    assert all(p == w[: len(p)] for p, w in zip(tokens(partial), tokens(whole[0])))
    assert decoded + engine.stats().decoded_tokens == sum(len(s) for s in partial + untouched)


def test_continuing_from_prefixes_equals_never_stopping(engine: RolloutEngine) -> None:
    again = repeatable(engine)
    whole = run(engine, ask("r", prompt(8), 3, sampling=again, new=20))[0]
    cuts = (0, 7, 19)
    prefixes = tuple(s.token_ids[:cut] for s, cut in zip(whole, cuts))
    rest = run(engine, ask("r", prompt(8), 3, sampling=again, new=20, prefixes=prefixes))[0]
    alone = run(engine, ask("r", prompt(8), 1, sampling=again, new=20, prefixes=prefixes[1:2], indices=(1,)))[0]
    assert [s.sample_id for s in alone] == ["r/1"] and alone[0].token_ids.tolist() == rest[1].token_ids.tolist()
    for w, r, cut in zip(whole, rest, cuts):  # max_new_tokens counts the tokens of the prefix too
        assert r.token_ids.tolist() == w.token_ids[cut:].tolist() and r.finish is Finish.LENGTH
        np.testing.assert_allclose(r.rollout_logprobs, w.rollout_logprobs[cut:], atol=1e-5)
    with pytest.raises(ValueError, match="no room in 7 new tokens"):
        ask("r", prompt(8), 3, new=7, prefixes=prefixes)


def test_closing_an_iterator_frees_its_slots(engine: RolloutEngine) -> None:
    async def leave_early() -> list[Sample]:
        stream = engine.generate(ask("left", prompt(8), 8, new=80))
        await anext(stream)
        await stream.aclose()
        return await collect(engine, ask("next", prompt(9, 1), 4, new=5))

    assert len(asyncio.run(leave_early())) == 4


@pytest.mark.parametrize("way", ["disk", "shared memory", "device"])
def test_loaded_weights_are_the_policy_at_once_and_exactly(engine: RolloutEngine, models: dict[str, Path], way: str) -> None:
    ids = prompt(30)
    old = tokens(run(engine, ask("r", ids, 2, sampling=GREEDY))[0])  # fills the prefix store with keys of the old weights
    expected = Reference(models["other"]).greedy(ids, 12)
    assert old[0] != expected
    publisher = DeviceBuckets("contract", torch.device("cpu")) if way == "device" else SharedMemoryPublisher("contract")
    source = Disk(str(models["other"])) if way == "disk" else publisher.publish(open_hf_folder(models["other"]).items(), 3, 50_000)
    receipt = asyncio.run(engine.load_weights(source, 3))
    publisher.publish(
        [(name, torch.zeros_like(t)) for name, t in open_hf_folder(models["other"]).items()], 4, 50_000
    )  # over what was loaded
    publisher.close()
    assert receipt.version == 3 and receipt.n_tensors == len(open_hf_folder(models["other"]))
    assert way == "disk" or receipt.checksums == {b.key: b.checksum for b in source.buckets}
    new = run(engine, ask("r", ids, 2, sampling=GREEDY))[0]
    assert tokens(new) == [expected, expected] and new[0].versions == ((3, 12),)
    fresh = embedded(models["other"])
    truth = run(fresh, ask("r", ids, 2, sampling=GREEDY))[0][0].rollout_logprobs
    np.testing.assert_allclose(new[0].rollout_logprobs, truth, rtol=0, atol=0 if isinstance(engine, EmbeddedEngine) else 1e-4)
    fresh.close()


def test_broadcast_weights_go_into_the_engine_itself(
    engine: RolloutEngine, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pipeline stages, a group each: the bytes pass no worker, and the engine holds what it holds after reading the same files."""
    if not isinstance(engine, GroupMember):
        pytest.skip("the engine is no member of process groups; the worker beside it is")
    of_files = asyncio.run(engine.load_weights(Disk(str(models["other"])), 4))
    asyncio.run(engine.load_weights(Disk(str(models["qwen2"])), 0))
    groups, store = broadcast_groups([Feed(0, BROADCAST)], width=1, pp=2, dp=1), open_store("127.0.0.1", 0, keeps=True)
    first, other = ([*open_hf_folder(models[name]).items()] for name in ("qwen2", "other"))
    wires: dict[BroadcastGroup, ServerWire] = {}

    def take(version: int, tensors: list[Named], rounds: int) -> tuple[Receipt, Broadcast]:
        def send(group: BroadcastGroup) -> Broadcast:
            if group not in wires:
                wires[group] = ServerWire(group, open_store("127.0.0.1", store.port, keeps=False), torch.device("cpu"), 60.0)
            return [wires[group].send(tensors[group.stage :: 2], version, 50_000) for _ in range(rounds)][-1]

        with ThreadPoolExecutor(2) as threads:
            sending = [threads.submit(send, group) for group in groups]
            if version == 0 and not engine._groups:
                asyncio.run(engine.join(("127.0.0.1", store.port), groups, 0, 60.0))
            receipt = asyncio.run(engine.load_weights(Collective(tuple(g.name for g in groups)), version))
            return receipt, merge_sources([s.result(60) for s in sending])

    monkeypatch.setattr(engine, "_proved", False)
    before = tokens(run(engine, ask("r", prompt(30), 2, sampling=GREEDY))[0])
    take(0, first, 2)
    assert tokens(run(engine, ask("r", prompt(30), 2, sampling=GREEDY))[0]) == before
    receipt, sent = take(5, other, 1)
    assert len(sent.buckets) > 4 and receipt.engine_tensors == of_files.engine_tensors
    check_receipts([sent], 5, [receipt])
    expected = Reference(models["other"]).greedy(prompt(30), 12)
    found = run(engine, ask("r", prompt(30), 2, sampling=GREEDY))[0]
    assert tokens(found) == [expected, expected] and found[0].versions == ((5, 12),)
    with pytest.raises(RunFailed, match="weights of version 6 are not the model's: missing tensor model.norm.weight"):
        take(6, [(name, tensor) for name, tensor in other if name != "model.norm.weight"], 1)
    asyncio.run(engine._ask("/continue_generation", {}))
    asyncio.run(engine.load_weights(Disk(str(models["qwen2"])), 0))
    monkeypatch.setattr(engine, "_proved", False)
    with pytest.raises(RunFailed, match="weights of version 0: SGLang's checksum of model.embed_tokens.weight is another one"):
        take(0, other, 2)
    asyncio.run(engine._ask("/continue_generation", {}))


def test_weights_loaded_under_way_stamp_the_tokens_that_follow(engine: RolloutEngine, models: dict[str, Path]) -> None:
    async def swap() -> list[Sample]:
        task = asyncio.create_task(collect(engine, ask("r", prompt(8), 6, sampling=GREEDY, new=85)))
        await until_decoding(engine)
        await engine.load_weights(Disk(str(models["other"])), 1)
        return await task

    samples = asyncio.run(swap())
    split = next(s for s in samples if len(s.versions) == 2)
    before = split.versions[0][1]
    assert [v for v, _ in split.versions] == [0, 1]
    head = np.concatenate([prompt(8), split.token_ids[:before]])
    assert split.token_ids[before : before + 10].tolist() == Reference(models["other"]).greedy(head, 10)


@pytest.mark.parametrize(("fault", "message"), [
    ("nan", "model.layers.2.mlp.up_proj.weight holds values that are not finite"),
    ("missing", "missing tensor model.layers.2.mlp.up_proj.weight"),
    ("shape", r"model.layers.2.mlp.up_proj.weight has shape \(64, 128\)"),
    ("unexpected", "unexpected tensor extra.weight"),
])  # fmt: skip
def test_faulty_weights_are_refused_by_name_and_the_old_ones_stay(
    engine: RolloutEngine, models: dict[str, Path], fault: str, message: str
) -> None:
    before = tokens(run(engine, ask("r", prompt(9), 2, sampling=repeatable(engine)))[0])
    tensors, name = dict(open_hf_folder(models["other"])), "model.layers.2.mlp.up_proj.weight"
    if fault == "nan":
        tensors[name][3, 5] = float("nan")
    elif fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name].t().contiguous()
    else:
        tensors["extra.weight"] = torch.ones(1)
    publisher = SharedMemoryPublisher("contract-faulty")
    source = publisher.publish(tensors.items(), 1)
    with pytest.raises(RunFailed, match=message):
        asyncio.run(engine.load_weights(source, 1))
    publisher.close()
    assert tokens(run(engine, ask("r", prompt(9), 2, sampling=repeatable(engine)))[0]) == before


def test_an_engine_that_breaks_tells_every_waiting_request(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(engine, EmbeddedEngine):
        pytest.skip("breaks the embedded engine from the inside; tests/test_sglang.py kills a process of SGLang")

    def fail(*_: object) -> None:
        raise ArithmeticError("planted")

    monkeypatch.setattr(engine._batcher.model, "logits", fail)

    async def both() -> list[object]:
        return await asyncio.gather(collect(engine, ask("a", prompt(5))), collect(engine, ask("b", prompt(6))), return_exceptions=True)

    assert [type(e) for e in asyncio.run(both())] == [RuntimeError, RuntimeError]
    with pytest.raises(RuntimeError, match="planted"):
        run(engine, ask("later", prompt(5)))


def test_sleeping_engine_refuses_until_weights_return(engine: RolloutEngine, models: dict[str, Path]) -> None:
    if not engine.capabilities.sleep:
        pytest.skip("the engine gives no memory back: SGLang does on a GPU, with rollout.sglang.enable_memory_saver")
    before = tokens(run(engine, ask("r", prompt(9), 2))[0])
    asyncio.run(engine.sleep(frozenset({"kv", "weights"})))
    with pytest.raises(RuntimeError, match="asleep"):
        run(engine, ask("r", prompt(9)))
    asyncio.run(engine.load_weights(Disk(str(models["qwen2"])), 0))
    asyncio.run(engine.wake(frozenset({"kv"})))
    assert tokens(run(engine, ask("r", prompt(9), 2))[0]) == before


def test_closed_engine_says_so(engine: RolloutEngine) -> None:
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(engine, ask("r", prompt(5)))
