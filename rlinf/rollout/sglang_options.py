"""The options that an SGLang server is started with, in the spelling of its command line with underscores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlinf.errors import UserError
from rlinf.rollout.limits import SLACK, kv_tokens_on_cpu
from rlinf.weights.dtypes import DTYPES, dtype_name

ON_CPU = {
    "attention_backend": "torch_native", "sampling_backend": "pytorch", "grammar_backend": "none", "disable_overlap_schedule": True,
    "sleep_on_idle": True,  # an idle scheduler would spin on a core that the actor needs
}  # fmt: skip


@dataclass(frozen=True)
class ServerNode:
    """One node of a server that spans several nodes. address: host:port of the first node, where their processes meet."""

    nodes: int
    rank: int
    address: str

    def options(self) -> dict[str, Any]:
        return {"nnodes": self.nodes, "node_rank": self.rank, "dist_init_addr": self.address}


def of_model(model_dir: str, dtype: str, max_context: int, trust_remote_code: bool) -> dict[str, Any]:
    """dtype: fp32, bf16 or fp16."""
    return {
        "model_path": model_dir, "dtype": dtype_name(DTYPES[dtype]), "context_length": max_context + SLACK,
        "trust_remote_code": trust_remote_code, "weight_version": "0", "incremental_streaming_output": True,
        "sampling_defaults": "openai", "log_level_http": "warning",
    }  # fmt: skip


def on_device(device: str, slots: int, max_context: int, memory_fraction: float, memory_saver: bool) -> dict[str, Any]:
    """SGLang records graphs of decode steps for as many samples as it thinks a GPU good for, 256 on an H100 and 48 on an RTX 4090; a step
    of more would run without one, at the pace of its host.

    Graphs of prefills are left out: those of 0.5.21 read memory that another of them may have written since (sgl-project/sglang#37606), so
    that tokens are wrong in silence, and what they take of the GPU does not come back in sleep(). rollout.sglang can ask for them.
    """
    common = {"device": device, "max_running_requests": slots}
    if device == "cpu":
        return common | ON_CPU | {"max_total_tokens": kv_tokens_on_cpu(slots, max_context)}
    saver = {"enable_memory_saver": True} if memory_saver else {}
    graphs = {"cuda_graph_max_bs_decode": slots, "disable_prefill_cuda_graph": True}
    return common | {"mem_fraction_static": memory_fraction} | graphs | saver


def check(options: dict[str, Any]) -> None:
    """Raises UserError for what SGLang would say only when the weights are loaded, by the failure of a kernel."""
    chosen = {"attention_backend", "prefill_attention_backend", "decode_attention_backend"} & options.keys()
    if options["device"] != "cpu" and options["dtype"] == "float32" and not chosen:
        raise UserError(
            "rollout.precision: fp32: the attention that SGLang chooses on a GPU takes 16-bit numbers only; set rollout.precision to bf16, "
            "or name one that takes fp32: rollout.sglang: {attention_backend: torch_native}"
        )
