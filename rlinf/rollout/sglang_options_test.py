from __future__ import annotations

import pytest

from rlinf.errors import UserError
from rlinf.rollout.sglang_options import ServerNode, check, of_model, on_device


def test_every_step_of_a_full_engine_on_a_gpu_has_a_graph_and_no_prefill_has() -> None:
    options = on_device("cuda", 400, 1000, 0.5, memory_saver=True)
    assert options["cuda_graph_max_bs_decode"] == options["max_running_requests"] == 400
    assert options["disable_prefill_cuda_graph"] and "disable_prefill_cuda_graph" not in on_device(
        "cpu", 400, 1000, 0.5, memory_saver=False
    )
    assert options["mem_fraction_static"] == 0.5 and options["enable_memory_saver"]
    assert "cuda_graph_max_bs_decode" not in on_device("cpu", 400, 1000, 0.5, memory_saver=False)


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
    options = of_model("model", dtype, 1000, False) | on_device(device, 4, 1000, 0.5, False) | given
    if not refused:
        check(options)
        return
    with pytest.raises(UserError, match="rollout.precision: fp32: .* set rollout.precision to bf16"):
        check(options)


def test_a_part_of_an_engine_knows_its_place() -> None:
    assert ServerNode(2, 1, "10.0.0.1:20000").options() == {"nnodes": 2, "node_rank": 1, "dist_init_addr": "10.0.0.1:20000"}
