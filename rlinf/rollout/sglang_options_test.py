from __future__ import annotations

from dataclasses import replace

import pytest

from rlinf.errors import UserError
from rlinf.rollout.sglang_options import ServerNode, ServerSettings, check


def test_every_step_of_a_full_engine_on_a_gpu_has_a_graph_and_no_prefill_has() -> None:
    settings = ServerSettings("model", "bf16", 400, 1000, seed=0, device="cuda", memory_fraction=0.5, memory_saver=True)
    options, on_cpu = settings.options(), replace(settings, device="cpu").options()
    assert options["cuda_graph_max_bs_decode"] == options["max_running_requests"] == 400
    assert options["disable_prefill_cuda_graph"] and "disable_prefill_cuda_graph" not in on_cpu
    assert options["mem_fraction_static"] == 0.5 and options["enable_memory_saver"]
    assert "cuda_graph_max_bs_decode" not in on_cpu


@pytest.mark.parametrize(
    ("device", "dtype", "given", "refused"),
    [
        ("cuda", "fp32", {}, True),
        ("cuda", "fp32", {"attention_backend": "torch_native"}, False),
        ("cuda", "bf16", {}, False),
        ("cpu", "fp32", {}, False),
    ],
)
def test_fp32_on_a_gpu_wants_an_attention_that_takes_it(device: str, dtype: str, given: dict[str, str], refused: bool) -> None:
    options = ServerSettings("model", dtype, 4, 1000, seed=0, device=device).options() | given
    if not refused:
        check(options)
        return
    with pytest.raises(UserError, match="rollout.precision: fp32: .* set rollout.precision to bf16"):
        check(options)


def test_a_part_of_an_engine_knows_its_place() -> None:
    alone = ServerSettings("model", "fp32", 4, 1000, seed=0)
    first, second = (replace(alone, node=ServerNode(2, rank, "10.0.0.1:20000")) for rank in (0, 1))
    place = {"nnodes": 2, "node_rank": 1, "dist_init_addr": "10.0.0.1:20000"}
    assert second.options() == alone.options() | place
    assert [s.serves for s in (alone, first, second)] == [True, True, False]
