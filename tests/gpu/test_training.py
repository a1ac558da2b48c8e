"""The actor on a GPU: attention, optimizer steps in every precision, offload, checkpoints, the reference policy, weights to an engine."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlinf import device as devices
from rlinf.checks.layout import deviations, worst
from rlinf.checks.tiny_model import VOCAB, write_tiny_model
from rlinf.config.schema import ActorConfig, Config, LoraConfig, RolloutConfig, RunnerConfig
from rlinf.data.packing import build_rank_batches
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.errors import UserError
from rlinf.rollout.build import build_engine
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.scheduling.devices import data_sheet_flops
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training import checkpoint
from rlinf.training import logprobs as head
from rlinf.training.engine import MegatronEngine
from rlinf.training.offload import Offloader
from rlinf.training.profiling import profiled
from rlinf.training.publishing import Publisher, sequence_logprobs
from rlinf.training.reference import ReferencePolicy
from rlinf.weights.receipts import check_probes
from rlinf.weights.routes import DEVICE_IPC, SHARED_MEMORY
from rlinf.workers.device import peak_flops
from rlinf.workers.token_reward import TokenRewardWorker
from tests.tiny import make_tiny_model
from tests.training_ranks import build, logprobs, minibatches, snapshot, update

ALL_WEIGHTS, ADAPTERS = LoraConfig(), LoraConfig(rank=8)
PROBES = [np.random.default_rng(i).integers(1, 130, 20 + i).astype(np.int32) for i in range(3)]


def engine_on(device: torch.device, at: Any, folder: Path, precision: str = "fp32", **model: Any) -> MegatronEngine:
    return build(at, folder, precision=precision, device=device.type, **model)


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums in the same order every time. On a GPU what the responses of a prompt send back to its last row is added in any order else.

    Flash attention has an order of its own where the keys are one block, as they are here: warn_only would not give it one.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_a_shared_prompt_gives_what_copies_give(
    device: torch.device, at: Any, models: dict[str, Path], precision: str, tolerance: float
) -> None:
    """Responses attend to keys that are longer than their queries: on a GPU that is a path of its own (causal, aligned to the end)."""
    engine = engine_on(device, at, models["qwen3"], precision)
    shared, apart = ({}, {})
    for found, share in ((shared, True), (apart, False)):
        for packs, *_ in minibatches(engine, n=1, budget=512, share_prefix=share):
            for batch, values in zip(packs, logprobs(engine, packs)):
                lengths = torch.bincount(batch.sample_N, minlength=batch.n_samples).tolist()
                found |= dict(zip(batch.sample_ids, (v.float().cpu() for v in values.split(lengths))))
    assert shared.keys() == apart.keys() and len(shared) > 10
    assert max(float((shared[k] - apart[k]).abs().max()) for k in shared) <= tolerance


@pytest.mark.parametrize("compiled", [True, False], ids=["our kernels", "torch's operations"])
def test_chunks_of_logits_do_not_change_the_head(compiled: bool, device: torch.device, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of five chunks are those of one, and where Triton or a compiler is missing those of three rows at a time."""
    from megatron.core import parallel_state

    if not compiled:
        monkeypatch.setattr(head, "_fused", lambda _: None)
        monkeypatch.setattr(head, "kernels_for", lambda *_: None)
        for name in ("BLOCK_BYTES", "CPU_BLOCK_BYTES"):
            monkeypatch.setattr(head, name, 3 * 96 * 4)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(device).requires_grad_() for n in (40, 96))
    targets, found = torch.randint(0, 90, (40,), generator=generator).to(device), []
    for rows in (8, 40):
        for name in ("CHUNK_BYTES", "GPU_CHUNK_BYTES"):
            monkeypatch.setattr(head, name, rows * 96 * 4)
        group = parallel_state.get_tensor_model_parallel_group()
        logprob, entropy = head.target_logprobs(hidden, weight, targets, temperature=0.7, vocab=90, group=group)
        found.append([logprob, entropy, *torch.autograd.grad((logprob * 2 + entropy).sum(), [hidden, weight])])
    for in_five, in_one in zip(*found):
        torch.testing.assert_close(in_five, in_one, rtol=1e-3, atol=1e-3 if device.type == "cuda" else 1e-5)


@pytest.mark.parametrize(
    ("family", "lora"), [("qwen2-tied", ALL_WEIGHTS), ("qwen3", ALL_WEIGHTS), ("qwen3-moe", ALL_WEIGHTS), ("qwen2-tied", ADAPTERS)]
)
def test_transformer_engines_layers_give_what_the_local_ones_give(
    device: torch.device, at: Any, models: dict[str, Path], family: str, lora: LoraConfig
) -> None:
    """The gradient of every tensor under its Hugging Face name, within what TF32 leaves.

    The twin without a GPU: a refusal, in so many words.
    """
    if device.type == "cpu":
        with pytest.raises(UserError, match="model.transformer_impl: .* there is no GPU"):
            engine_on(device, at, models[family], transformer_impl="transformer_engine")
        return
    pytest.importorskip("transformer_engine.pytorch")
    norms, gradients = {}, {}
    for implementation in ("local", "transformer_engine"):
        engine = engine_on(device, at, models[family], transformer_impl=implementation, lora=lora)
        norms[implementation] = update(engine, minibatches(engine, n=1, budget=512)[0]).grad_norm
        gradients[implementation] = {
            name: tensor.cpu().numpy() for name, tensor in engine.export("exp_avg")
        }  # after one step a tenth of it
    assert norms["transformer_engine"] == pytest.approx(norms["local"], rel=0.01)
    assert worst(deviations(gradients["transformer_engine"], gradients["local"], gradients["local"]))[0] <= 0.02


@pytest.mark.parametrize(
    "recompute",
    [{}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}],
    ids=["kept", "recomputed"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_16_bits_is_close_to_the_one_in_fp32(
    device: torch.device, at: Any, models: dict[str, Path], precision: str, recompute: dict[str, Any]
) -> None:
    """Whose gradients are added up over several micro-batches."""
    norms = {}
    for name, budget in (("fp32", 512), (precision, 60)):
        engine = engine_on(device, at, models["qwen2-tied"], name, **recompute)
        before = snapshot(engine)
        mini = minibatches(engine, n=1, budget=budget)[0]
        assert (len(mini[0]) > 1) == (name == precision)
        done = update(engine, mini)
        assert not done.skipped and snapshot(engine) != before
        norms[name] = done.grad_norm
    assert norms[precision] == pytest.approx(norms["fp32"], rel=0.05)


@pytest.mark.parametrize("lora", [ALL_WEIGHTS, ADAPTERS], ids=["all weights", "adapters"])
def test_offloading_frees_the_device_and_training_does_not_notice(
    device: torch.device, at: Any, models: dict[str, Path], repeatable: None, lora: LoraConfig
) -> None:
    engine, twin = (engine_on(device, at, models["llama"], "bf16", lora=lora) for _ in range(2))
    offloader = Offloader(engine, ActorConfig(offload_weight=True, offload_grad=True, offload_optimizer=True))
    offloader.after_training()  # before the first step, so that engines can start; publishing then needs the weights alone
    offloader.after_publishing()
    offloader.before_forward()
    assert all(np.array_equal(a, b) for a, b in zip(sequence_logprobs(engine, PROBES), sequence_logprobs(twin, PROBES)))
    for mini in minibatches(engine, n=2):
        offloader.before_use()
        update(engine, mini)
        update(twin, mini)
        full = devices.memory_in_use(device)
        offloader.after_training()
        offloader.after_publishing()
        if device.type == "cuda":
            weights, trained = (sum(p.numel() for _, p in params) for params in (engine.state.params, engine.state.trained))
            untrained = weights if lora.rank else 0
            least = 16 * trained + 2 * untrained  # of what is trained: gradients 4, master weights and moments 12 bytes
            assert full - devices.memory_in_use(device) >= least
    offloader.before_use()
    assert snapshot(engine) == snapshot(twin)


def test_training_goes_on_from_saved_state(device: torch.device, at: Any, models: dict[str, Path], repeatable: None) -> None:
    """Adam's step counts are where the fused kernel reads them."""
    engine, twin = (engine_on(device, at, models["qwen2"], "bf16") for _ in range(2))
    first, second = minibatches(engine)
    update(engine, first)
    kinds = {kind: {name: t.clone() for name, t in engine.export(kind)} for kind in ("param", "exp_avg", "exp_avg_sq")}
    twin.load_state(kinds, engine.steps, engine.optimizer_state.steps())
    for e in (engine, twin):
        assert not update(e, second).skipped
    assert snapshot(engine) == snapshot(twin) and engine.optimizer_state.steps() == 2


def test_a_checkpoint_is_saved_and_loaded(device: torch.device, at: Any, models: dict[str, Path], repeatable: None, tmp_path: Path) -> None:
    """Written from the device, compared with what the engine computes, read back into another engine."""
    engine, twin = (engine_on(device, at, models["qwen2"], "bf16") for _ in range(2))
    update(engine, minibatches(engine)[0])
    checkpoint.save(engine, tmp_path, models["qwen2"])
    checkpoint.load(twin, tmp_path)
    assert snapshot(twin) == snapshot(engine) and twin.steps == engine.steps == 1


def test_the_reference_policy_is_swapped_in_and_out(device: torch.device, at: Any, models: dict[str, Path]) -> None:
    engine = engine_on(device, at, models["qwen2"])
    reference = ReferencePolicy(engine)
    before = sequence_logprobs(engine, PROBES)
    update(engine, minibatches(engine)[0])
    after = sequence_logprobs(engine, PROBES)
    with reference.swapped_in():
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(sequence_logprobs(engine, PROBES), before))
    assert all(np.array_equal(a, b) for a, b in zip(sequence_logprobs(engine, PROBES), after)) and not np.allclose(after[0], before[0])


def test_a_token_reward_model_is_parked_while_it_does_not_score(device: torch.device, at: Any, tmp_path: Path) -> None:
    config = Config()
    config.cluster.device = device.type
    config.token_reward.model_dir = str(write_tiny_model(tmp_path / "scorer", "qwen2", head="scalar"))
    config.token_reward.model.precision = "fp32"
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(0, VOCAB, n).astype(np.int32)
    samples = tuple(
        Sample(f"g/{i}", tokens(n), np.zeros(n, np.float32), np.ones(n, np.uint8), ((0, n),), Finish.STOP) for i, n in enumerate((3, 9))
    )
    group = Group("g", Prompt("g", tokens(5), "math", ("1",)), samples)
    (batch,) = build_rank_batches([group.header()], [np.zeros(2)], dp=1, n_minibatches=1, max_tokens=64, share_prefix=True)
    found = {}
    for parked in (False, True):
        config.token_reward.offload_weight = parked
        worker = TokenRewardWorker(WorkerAddress("token_reward", 0, 1, 0, (0,), "127.0.0.1", 0, "run", 1), config)
        found[parked] = [worker.scores(batch, group)[0].scores for _ in range(2)]
        away = {p.untyped_storage().size() == 0 for p in worker.engine.model.parameters()}
        assert away == {parked and device.type == "cuda"}
    assert found[True] == found[False] and all(found[True][0][s.sample_id] != 0 for s in samples)


@pytest.mark.parametrize("transport", [SHARED_MEMORY, DEVICE_IPC])
@pytest.mark.parametrize(("family", "precision"), [("qwen2-tied", "fp32"), ("qwen2-tied", "bf16"), ("qwen3-moe", "bf16")])
def test_an_engine_on_the_same_device_runs_the_actors_weights(
    device: torch.device, at: Any, models: dict[str, Path], family: str, precision: str, transport: str, tmp_path: Path
) -> None:
    """Also when what it took them from holds something else. The engine is made as a worker makes it."""
    actor = engine_on(device, at, models[family], precision)
    update(actor, minibatches(actor)[0])
    config = Config(runner=RunnerConfig(seq_length=64))
    config.rollout = RolloutConfig(str(models[family]), rollout_backend="embedded", precision=precision, gpu_memory_utilization=1.0)
    engine = build_engine(config, SimpleNamespace(decode=str), device.type, tmp_path / "engine.log", "gpu-test")
    publisher = Publisher(actor, f"gpu-test-{family}-{precision}", tmp_path)
    try:
        asyncio.run(engine.load_weights(publisher.hand_out(1, [transport]).sources[transport], 1))
        for buffer in publisher.on_device._offered.values():
            buffer.zero_()
        check_probes(1, precision, sequence_logprobs(actor, PROBES), [asyncio.run(engine.sequence_logprobs(PROBES))])
    finally:
        publisher.close()
        engine.close()


@pytest.mark.gpu
def test_a_sleeping_embedded_engine_gives_its_memory_back(tmp_path: Path) -> None:
    """To other processes: what this one's allocator keeps is no use to an actor."""
    folder, device = make_tiny_model(tmp_path / "model", hidden=1024, heads=8), devices.choose("cuda")
    weights = (folder / "model.safetensors").stat().st_size
    engine = EmbeddedEngine(str(folder), dtype="fp32", slots=4, max_context=64, seed=0, device=device.type)
    try:
        devices.give_back_free_memory(device)  # what other tests have left, and what loading took
        awake = devices.free_gpu_memory()
        asyncio.run(engine.sleep(frozenset({"kv", "weights"})))
        assert devices.free_gpu_memory() - awake >= 0.9 * weights
    finally:
        engine.close()


def test_a_profile_has_the_kernels_of_the_device(device: torch.device, at: Any, tmp_path: Path) -> None:
    runner = RunnerConfig(output_dir=str(tmp_path), experiment_name="run", profile_steps=[3], profile_ranks=[0])
    for step in (2, 3):
        with profiled(runner, step, "actor"):
            a = torch.ones(64, 64, device=device)
            (a @ a).sum().item()
    (file,) = (tmp_path / "run" / "profile").iterdir()
    trace = gzip.decompress(file.read_bytes()).decode()
    assert file.name == "step_000003-actor-0.json.gz" and "aten::mm" in trace
    assert ('"cat": "kernel"' in trace) == (device.type == "cuda")


def test_peak_operations_are_those_of_the_data_sheet(device: torch.device) -> None:
    assert peak_flops(device) == (data_sheet_flops(devices.gpu_name()) if device.type == "cuda" else 0.0)
