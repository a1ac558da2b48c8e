"""What is moved to host memory and back is what was there, and training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlinf.config.schema import ActorConfig, LoraConfig
from rlinf.training.offload import Offloader, Parked, optimizer_tensors, untrained_weights
from tests.training_ranks import build, minibatches, snapshot, update


def test_parked_tensors_give_their_memory_away_and_come_back_the_same() -> None:
    tensors = [torch.randn(5, 3), torch.arange(7, dtype=torch.bfloat16)]
    values, parked = [t.clone() for t in tensors], Parked()
    for _ in range(2):
        parked.park(iter(tensors))
        parked.park(iter(tensors))  # what is away stays away
        assert [t.untyped_storage().size() for t in tensors] == [0, 0]
        parked.bring_back()
        parked.bring_back()
        assert all(torch.equal(t, v) for t, v in zip(tensors, values))
        tensors[0] += 1
        values[0] += 1


def steps_with_and_without(at: Any, folder: Path, precision: str) -> dict[str, Any]:
    engine, twin = build(at, folder, precision=precision), build(at, folder, precision=precision)
    batches = minibatches(engine, n=3)
    offloader = Offloader(engine, ActorConfig(offload_weight=True, offload_grad=True, offload_optimizer=True))
    offloader.optimizer = True  # as on a GPU
    offloader.after_training()  # as an actor whose engines are to start
    offloader.after_publishing()
    freed = []
    for mini in batches:
        offloader.before_use()
        update(engine, mini)
        update(twin, mini)
        offloader.after_training()
        freed.append(
            sum(t.untyped_storage().size() for t in optimizer_tensors(engine)) == 0
            and all(b.grad_data.untyped_storage().size() == 0 for b in engine.ddp.buffers)
        )
        offloader.after_publishing()
    offloader.before_use()
    masters = sum(any(t is p for g in engine.distributed.optimizer.param_groups for p in g["params"]) for t in optimizer_tensors(engine))
    same = snapshot(engine) == snapshot(twin)
    return {"same": same, "freed": freed, "masters": masters}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_bit_for_bit_with_the_optimizer_away_between_steps(
    rank_pool: Any, tiny_models: dict[str, Path], precision: str
) -> None:
    for found in rank_pool.run(steps_with_and_without, tiny_models["qwen2-tied"], precision, ranks=2):
        assert found["same"] and all(found["freed"])
        assert (found["masters"] > 0) == (precision == "bf16")  # in fp32 the master weights are the model's own


def adam_of(at: Any, folder: Path) -> tuple[str, list[str]]:
    import megatron.core.optimizer as megatron_optimizer

    class TheirAdam(torch.optim.AdamW):
        pass

    megatron_optimizer.USING_PYTORCH_OPTIMIZER, megatron_optimizer.Adam = False, TheirAdam  # as where Transformer Engine is installed
    engine = build(at, folder)
    engine.optimizer_state.allocate()
    engine.optimizer_state.restore_steps(3)
    kind = type(engine.distributed.optimizer).__name__
    devices = [str(s["step"].device) for s in engine.distributed.optimizer.state.values()]
    return kind, devices


def test_adam_is_torchs_even_where_another_is_installed(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    """Its step counts are kept by parameter, where a checkpoint finds them, and on the parameter's device,
    where the fused kernel reads them."""
    ((kind, devices),) = rank_pool.run(adam_of, tiny_models["llama"], ranks=1)
    assert kind == "AdamW" and set(devices) == {"cpu"}


def weights_away_twice(at: Any, folder: Path) -> tuple[int, int, bool, bool]:
    engine = build(at, folder, precision="bf16", lora=LoraConfig(rank=2))
    offloader, before = Offloader(engine, ActorConfig(offload_weight=True)), [p.detach().clone() for p in untrained_weights(engine)]
    for _ in range(3):
        offloader.parked_weights.park(untrained_weights(engine))
        away = all(p.untyped_storage().size() == 0 for p in untrained_weights(engine))
        offloader.parked_weights.bring_back()
    copies = {host.data_ptr() for host in offloader.parked_weights._host.values()}
    return len(copies), len(before), away, all(map(torch.equal, untrained_weights(engine), before))


def test_weights_beside_adapters_leave_and_keep_one_copy_in_host_memory(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    ((copies, params, away, same),) = rank_pool.run(weights_away_twice, tiny_models["llama"], ranks=1)
    assert copies == params and away and same
