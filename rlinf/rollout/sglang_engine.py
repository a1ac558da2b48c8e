"""The SGLang rollout engine: implements the asynchronous contract of rollout engines with an SGLang server as a child process.

It uses only the server's HTTP routes: /generate, /abort_request, /pause_generation and /continue_generation, /flush_cache,
/update_weights_from_disk, /init_weights_update_group, /update_weights_from_distributed and /update_weights_from_tensor between
/begin_weight_update and /end_weight_update, /weights_checker, /release_memory_occupation and /resume_memory_occupation, /start_profile
and /stop_profile (docs/sglang.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.config.settings import read_texts
from rlinf.data.records import Finish, Sample
from rlinf.device import choose, give_back_free_memory
from rlinf.errors import RunFailed, UserError
from rlinf.rollout.contract import Capabilities, Counters, Decode, EngineStats, GenerateRequest
from rlinf.rollout.limits import SLACK, architecture_for, check_request
from rlinf.rollout.sglang_http import Refused, SGLangHttp
from rlinf.rollout.sglang_options import ServerSettings, check
from rlinf.rollout.sglang_samples import Arriving, arriving, body_of
from rlinf.rollout.sglang_server import SGLangServer, find_interpreter
from rlinf.rollout.sglang_weights import offered
from rlinf.weights.broadcast import open_store
from rlinf.weights.complete import check_shapes, check_tensors
from rlinf.weights.dtypes import DTYPES, dtype_name
from rlinf.weights.files import folders_of
from rlinf.weights.opening import open_source
from rlinf.weights.receipts import first_difference
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.server_groups import MAKING, Follower
from rlinf.weights.source import BucketSpec, Collective, DeviceIpc, Disk, Files, Receipt, SharedMemory, WeightSource

REGIONS = {"kv": "kv_cache", "weights": "weights"}
IDLE_WITHIN = 60.0  # seconds that a server has for the step that is under way when its last request has been answered
RETRY = 0.05  # seconds between two attempts to abort a sample that the scheduler has not heard of yet


class SGLangEngine:
    """One server. It is seeded when it runs with rollout.sglang.enable_deterministic_inference (which needs a GPU).

    A Sample holds the tokens decoded for its request (not those of its prefix). load_weights() may be called while requests run: their
    samples go on with the new weights, with all keys and values computed anew; the server reports which version decoded which token.
    log: the server's log file. run_id: marks its files in shared memory. python: the interpreter that has SGLang; None = found.
    on_death: called from another thread when the server dies; running requests then end with the tokens that have arrived (finish ABORT)
    instead of raising, because another engine will continue them. decode: finds stop strings at the end of an aborted sample.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        log: Path,
        run_id: str,
        python: str | None = None,
        start_timeout: float = 600.0,
        on_death: Callable[[], None] | None = None,
        decode: Decode | None = None,
    ) -> None:
        device, max_context, serves = settings.device, settings.max_context, settings.serves
        self._arch = architecture_for(settings.model_dir, max_context)
        options, given = settings.options(), read_texts(settings.native, "rollout.sglang")
        check(options | given)
        self._server = SGLangServer(find_interpreter(python, device != "cpu"), options, given, log, run_id, start_timeout, on_death, serves)
        self._http = SGLangHttp(self._server.port, self._server.key)
        info = self._server.info
        if serves and (problem := small_cache(info["max_total_num_tokens"], max_context, device)):
            self._server.close()
            raise UserError(problem)
        self.capabilities = Capabilities(
            seeded=bool(info.get("enable_deterministic_inference")),
            sleep=device != "cpu" and bool(info.get("enable_memory_saver")),
            max_context=max_context,
        )
        self._decode = decode
        self._version = 0
        self._seed = settings.seed if self.capabilities.seeded else None
        self._running: dict[str, list[Arriving]] = {}
        self._counters = Counters()
        self._busy_since = 0.0
        self._asleep: frozenset[str] = frozenset()
        self._loading = self._proved = False
        self._groups: dict[str, Follower] = {}  # by name, of those that the server has joined
        self._device, self._dtype = device, dtype_name(DTYPES[settings.dtype])
        self._tensor_parallel_size = settings.tensor_parallel_size
        self._tracing = self._closed = False

    @property
    def dead(self) -> bool:
        return self._server.death is not None

    # ---- samples --------------------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Sample]:
        """Yield the n samples as they finish. Raises ValueError for a request that cannot run, RuntimeError when the engine is broken."""
        self._check_usable()
        check_request(request, self.capabilities.max_context, self._arch.vocab)
        samples = arriving(request, self.capabilities.max_context)
        outbox: asyncio.Queue[Arriving | BaseException] = asyncio.Queue()
        started = asyncio.Event()
        self._begin(request.request_id, samples)
        alone = 1 if request.n > 1 and not request.prefixes else request.n  # the rest start when the prompt's keys and values are there
        feeds = (self._feed(request, samples[:alone], outbox, started), self._feed_after(started, request, samples[alone:], outbox))

        def put_error(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                outbox.put_nowait(error)

        tasks = [asyncio.ensure_future(feed) for feed in feeds]
        for task in tasks:
            task.add_done_callback(put_error)
        try:
            for _ in samples:
                item = await outbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item.sample()
        finally:
            for task in tasks:
                task.cancel()
            self._end(request.request_id)
            left = [a for a in samples if a.finish is None]
            if left and not self._closed and self._server.death is None:  # closed early
                await self._send_aborts(left)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all): their iterators yield what was decoded."""
        chosen = [a for name in (self._running if request_ids is None else request_ids) for a in self._running.get(name, ())]
        while self._loading:  # a paused server would forget it
            await asyncio.sleep(RETRY)
        for sample in chosen:
            sample.unwanted = True
        while pending := self._pending(chosen):
            self._check_usable()
            await self._send_aborts(pending)
            await asyncio.sleep(RETRY)

    async def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each token given those before it, at temperature 1: for a sequence of n tokens an array [n-1] float32."""
        self._check_usable()
        wanted = {"max_new_tokens": 0, "temperature": 0}
        body = {"input_ids": [s.tolist() for s in sequences], "sampling_params": wanted, "return_logprob": True, "logprob_start_len": 0}
        with self._speaking():
            answers = await self._http.post("/generate", body)
        return [np.array([p for p, *_ in a["meta_info"]["input_token_logprobs"][1:]], np.float32) for a in answers]

    async def _feed(
        self, request: GenerateRequest, samples: list[Arriving], outbox: asyncio.Queue[Arriving | BaseException], started: asyncio.Event
    ) -> None:
        """Hand out the samples of one call of /generate. When the server dies, those that are not finished end with what has arrived."""
        for sample in samples:
            sample.version, sample.certain = self._version, 0 if self._loading else None  # a paused one decodes it with those that come
        try:
            with self._speaking():
                async for event in self._http.stream("/generate", body_of(request, samples, self._seed, self._arch.vocab)):
                    if "error" in event:
                        raise RuntimeError(f"request {request.request_id}: SGLang refuses it: {event['error']['message']}")
                    sample = samples[event["index"]]
                    self._counters.add(decoded_tokens=sample.take(event))
                    started.set()
                    if sample.finish is not None:
                        self._finished(request, sample)
                        outbox.put_nowait(sample)
        except RuntimeError:
            if self._server.death is None or self._closed or self._server.on_death is None:
                raise
            for sample in (s for s in samples if s.finish is None):
                sample.cut_short()
                outbox.put_nowait(sample)
        finally:
            started.set()

    async def _feed_after(
        self, started: asyncio.Event, request: GenerateRequest, samples: list[Arriving], outbox: asyncio.Queue[Arriving | BaseException]
    ) -> None:
        await started.wait()
        wanted = [a for a in samples if not (a.unwanted or self._server.death)]
        for sample in samples:
            if sample not in wanted:  # aborted before it began
                sample.finish = Finish.ABORT
                outbox.put_nowait(sample)
        if wanted:
            await self._feed(request, wanted, outbox, started)

    async def _send_aborts(self, samples: Sequence[Arriving]) -> None:
        with self._speaking():
            await asyncio.gather(*(self._http.post("/abort_request", {"rid": a.rid}) for a in samples))

    # ---- weights --------------------------------------------------------------------------------------------------------------

    async def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup], engine: int, timeout: float) -> None:
        """Implements rollout.contract.GroupMember: every tensor-parallel rank of the server becomes a member."""
        for group in groups:
            follower = Follower(group, engine, open_store(*store, keeps=False), timeout)
            body = {
                "master_address": store[0], "master_port": store[1], "rank_offset": follower.first_rank, "world_size": len(group.members),
                "group_name": group.name, "backend": "gloo" if self._device == "cpu" else "nccl",
            }  # fmt: skip
            with follower.together(MAKING):
                await self._with_others("/init_weights_update_group", body, timeout)
            self._groups[group.name] = follower

    async def load_weights(self, source: WeightSource | Collective, version: int) -> Receipt:
        """Take the weights in place, flush every cache. Raises RunFailed and keeps the old weights when a tensor or bucket is at fault.

        A Collective comes over the groups that join() has made, past this process: its publisher has looked at the bytes, and the old
        weights are gone when it turns out that a tensor is missing.
        The first time it is also proved that loading writes every tensor: the server overwrites its weights with noise, loads again (the
        publisher of a Collective sends twice), and must report the same checksums.
        """
        self._check_open()
        start = time.perf_counter()
        n_tensors, nbytes = (0, 0) if isinstance(source, Collective) else await asyncio.to_thread(self._look_at, source, version)
        waiting = isinstance(source, Collective)  # for others: a server that does answers nobody
        self._loading = True
        try:
            if "weights" in self._asleep:
                await self._ask("/resume_memory_occupation", {"tags": [REGIONS["weights"]]})
                self._asleep -= {"weights"}
            await self._ask("/pause_generation", {"mode": "retract"})
            try:
                for sample in self._arriving():
                    sample.expect_other_weights()
                read = await self._checksums() if waiting and version == 0 and not self._proved else None
                buckets, checksums = await self._take(source, version)
                self._version = version
                if not self._proved:
                    await self._prove(source, version, checksums)
                    if read is not None:
                        self._compare(buckets, checksums, read)
                waiting = False
            finally:
                if self._server.death is None and not waiting:
                    await self._ask("/continue_generation", {"torch_empty_cache": False})
        finally:
            self._loading = False
        if isinstance(source, Collective):
            n_tensors, nbytes = sum(len(b.tensors) for b in buckets), sum(t.nbytes for b in buckets for t in b.tensors)
        return Receipt(version, {b.key: b.checksum for b in buckets}, n_tensors, nbytes, time.perf_counter() - start, checksums)

    def _look_at(self, source: WeightSource, version: int) -> tuple[int, int]:
        """SGLang takes what it is given, whether complete and finite or not; so it is looked at before. Returns (tensors, bytes)."""
        try:
            tensors = check_tensors(self._arch, open_source(source))
        except ValueError as error:
            if isinstance(source, Disk):
                raise UserError(f"{source.path}: {error}; the weights do not fit its config.json") from error
            raise RunFailed(f"weights of version {version} were refused: {error}") from error
        found = len(tensors), sum(t.nbytes for t in tensors.values())
        if isinstance(source, DeviceIpc):  # what the look took of the GPU is the server's and the actor's again
            del tensors
            give_back_free_memory(choose(self._device))
        return found

    async def _take(self, source: WeightSource | Collective, version: int) -> tuple[Sequence[BucketSpec], dict[str, str]]:
        """Into the server. Returns the buckets, with checksums that have been verified, and the server's own checksums."""
        buckets: Sequence[BucketSpec] = () if isinstance(source, (Disk, Collective)) else source.buckets
        if isinstance(source, Disk):
            await self._update(source.path, version)
        elif isinstance(source, Files):
            for folder in folders_of(source):
                await self._update(str(folder), version)
        elif isinstance(source, Collective):
            buckets = await self._follow(source, version)
        else:
            await self._hand_over(source, version)
        return buckets, await self._checksums()

    async def _hand_over(self, source: SharedMemory | DeviceIpc, version: int) -> None:
        """The server opens the buckets where they are."""
        await self._ask("/begin_weight_update", {})
        for bucket in source.buckets:
            with offered(bucket, Path(f"{self._server.folder}-bucket")) as payload:
                of_each_rank = [payload] * self._tensor_parallel_size
                body = {"serialized_named_tensors": of_each_rank, "load_format": "flattened_bucket", "weight_version": str(version)}
                await self._ask("/update_weights_from_tensor", body)
        await self._ask("/end_weight_update", {})

    async def _follow(self, source: Collective, version: int) -> list[BucketSpec]:
        """Have the server take part in what is broadcast in its groups, in their order. Raises RunFailed unless that is the whole model."""
        taken = []
        await self._ask("/begin_weight_update", {})
        for name in source.groups:
            follower = self._groups[name]
            with follower.together(follower.coming(version)):
                descriptions = follower.descriptions()
                while (bucket := await asyncio.to_thread(next, descriptions, None)) is not None:
                    taken.append(bucket)
                    names, dtypes, shapes = (list(column) for column in list(zip(*bucket.tensors))[:3])
                    body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": name, "weight_version": str(version)}
                    await self._with_others("/update_weights_from_distributed", body, follower.timeout)
        await self._ask("/end_weight_update", {})
        try:
            check_shapes(self._arch, {t.name: t.shape for bucket in taken for t in bucket.tensors})
        except ValueError as error:
            raise RunFailed(f"weights of version {version} are not the model's: {error}") from error
        return taken

    async def _prove(self, source: WeightSource | Collective, version: int, checksums: dict[str, str]) -> None:
        await self._ask("/weights_checker", {"action": "reset_tensors"})
        _, again = await self._take(source, version)
        if (name := first_difference(checksums, again)) is not None:
            raise RunFailed(f"weights of version {version}: after noise and a second load SGLang's checksum of {name} is another one: "
                            "it does not load every tensor")  # fmt: skip
        self._proved = True

    def _compare(self, buckets: Sequence[BucketSpec], checksums: dict[str, str], read: dict[str, str]) -> None:
        """Weights of version 0 are those of the model's folder, from which the server had read them: the same bytes, unless the actor has
        rounded them to another dtype than the server does."""
        rounded = {t.dtype for b in buckets for t in b.tensors} - {"float32", self._dtype}
        if not rounded and (name := first_difference(read, checksums)) is not None:
            raise RunFailed(
                f"weights of version 0: SGLang's checksum of {name} is another one than that of what it had read from the model's folder"
            )

    async def _checksums(self) -> dict[str, str]:
        """Of every tensor of every tensor-parallel rank, by SGLang's names; a part of its SHA-256, since a driver reads very many."""
        ranks = (await self._ask("/weights_checker", {"action": "checksum"}))["ranks"]
        places = [f" (TP rank {r['parallelism_info'][0]['tp_rank']})" if len(ranks) > 1 else "" for r in ranks]
        return {name + place: checksum[:16] for r, place in zip(ranks, places) for name, checksum in r["checksums"].items()}

    async def _update(self, folder: str, version: int) -> None:
        await self._ask("/update_weights_from_disk", {"model_path": folder, "weight_version": str(version), "flush_cache": True})

    # ---- memory ---------------------------------------------------------------------------------------------------------------

    async def sleep(self, tags: frozenset[str]) -> None:
        """Give GPU memory back: the KV cache, the weights (they come back with load_weights). Raises RuntimeError while requests run.

        Memory is really given back where the server runs with rollout.sglang.enable_memory_saver, on a GPU (capabilities.sleep).
        """
        self._check_open()
        if self._running:
            raise RuntimeError(f"cannot sleep with {len(self._running)} requests running; abort them first")
        fresh = tags - self._asleep
        if fresh:
            # with a step still under way behind the last token, the scheduler would not wait but end
            await self._ask(f"/flush_cache?timeout={IDLE_WITHIN:g}", {}, words=True)
            await self._ask("/release_memory_occupation", {"tags": [REGIONS[tag] for tag in sorted(fresh)]})
            self._asleep |= fresh

    async def wake(self, tags: frozenset[str]) -> None:
        """Ready to be used again; weights only with the next load_weights."""
        self._check_open()
        back = (tags - {"weights"}) & self._asleep
        if back:
            await self._ask("/resume_memory_occupation", {"tags": [REGIONS[tag] for tag in sorted(back)]})
            self._asleep -= back

    # ---- state ----------------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """busy_seconds: with requests in the server.

        truncated_mass is NaN when top-p or top-k cut anything: the server does not say what.
        """
        if self._running:
            now = time.perf_counter()
            self._counters.add(busy_seconds=now - self._busy_since)
            self._busy_since = now
        return self._counters.since_last()

    async def start_trace(self, folder: Path, name: str) -> None:
        """Each process of the engine records what it does; its file's name ends in its tensor-parallel rank."""
        body = {
            "output_dir": str(folder),
            "profile_id": name,
            "activities": ["CPU"] + ["GPU"] * (self._device != "cpu"),
            "with_stack": False,
        }
        await self._ask("/start_profile", body, words=True)
        self._tracing = True

    async def stop_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            await self._ask("/stop_profile", {}, words=True)

    def close(self) -> None:
        """End the server; pending iterators raise RuntimeError."""
        self._closed = True
        self._server.close()

    def _arriving(self) -> set[Arriving]:
        return {a for samples in self._running.values() for a in samples}

    def _pending(self, samples: Sequence[Arriving]) -> list[Arriving]:
        """Those that have not ended; those of a request that failed never will."""
        running = self._arriving()
        return [a for a in samples if a.finish is None and a in running]

    def _begin(self, request_id: str, samples: list[Arriving]) -> None:
        if request_id in self._running:
            raise ValueError(f"request {request_id}: it is already running")
        if not self._running:
            self._busy_since = time.perf_counter()
        self._running[request_id] = samples

    def _end(self, request_id: str) -> None:
        del self._running[request_id]
        if not self._running:
            self._counters.add(busy_seconds=time.perf_counter() - self._busy_since)

    def _finished(self, request: GenerateRequest, sample: Arriving) -> None:
        sample.look_again(request, self._decode)
        cut = request.sampling.temperature > 0 and (request.sampling.top_p < 1 or 0 < request.sampling.top_k < self._arch.vocab)
        self._counters.add(
            prefilled_tokens=len(sample.input_ids) - sample.cached_tokens,
            reused_tokens=sample.cached_tokens,
            truncated_mass=float("nan") if cut else 0.0,
        )

    async def _ask(self, path: str, body: dict[str, Any], words: bool = False) -> Any:
        """An answer that must be good."""
        with self._speaking():
            try:
                return await self._http.post(path, body, words)
            except Refused as error:
                raise RunFailed(f"SGLang refuses {path}: {error}; its log: {self._server.log}") from error

    async def _with_others(self, path: str, body: dict[str, Any], timeout: float) -> None:
        """An answer for which the server has to wait for others. Raises RuntimeError when it does not come."""
        try:
            await asyncio.wait_for(self._ask(path, body), timeout)
        except TimeoutError as error:
            raise RuntimeError(f"SGLang has not answered {path}; its log: {self._server.log}") from error

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """A broken connection means a dead server, and is told as that."""
        try:
            yield
        except (OSError, EOFError) as error:
            self._check_open()
            raise RuntimeError(self._server.obituary()) from error

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine was closed")
        if self._server.death is not None:
            raise RuntimeError(self._server.death)

    def _check_usable(self) -> None:
        self._check_open()
        if self._asleep:
            raise RuntimeError(f"the rollout engine is asleep ({', '.join(sorted(self._asleep))}); wake it, or load weights first")


def small_cache(held: int, max_context: int, device: str) -> str:
    """What is wrong with a KV cache of `held` tokens, if anything: SGLang would end longer samples without a word."""
    if held >= max_context + SLACK:
        return ""
    key = "rollout.sglang.max_total_tokens" if device == "cpu" else "rollout.gpu_memory_utilization"
    needed = f"a sample of runner.seq_length {max_context} needs {max_context + SLACK}"
    return f"the KV cache of an SGLang engine holds {held} tokens, and {needed}: raise {key}"
