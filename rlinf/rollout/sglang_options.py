"""The options that an SGLang server is started with, in the spelling of its command line with underscores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class ServerSettings:
    """What a server is to run. dtype: fp32, bf16 or fp16. slots: samples decoded at once. max_context: prompt + response tokens.
    memory_fraction: of a GPU. memory_saver: sleep() frees memory (on a GPU). native: options in the user's words (rollout.sglang).
    node: for a server that spans several nodes; all but the first take no requests."""

    model_dir: str
    dtype: str
    slots: int
    max_context: int
    seed: int
    device: str = "cpu"
    tensor_parallel_size: int = 1
    memory_fraction: float = 0.55
    memory_saver: bool = False
    trust_remote_code: bool = False
    native: Mapping[str, str] = field(default_factory=dict)
    node: ServerNode | None = None

    @property
    def serves(self) -> bool:
        """Whether requests go to this node."""
        return self.node is None or self.node.rank == 0

    def options(self) -> dict[str, Any]:
        """Ours; those of `native` come on top."""
        ours = {
            "model_path": self.model_dir, "dtype": dtype_name(DTYPES[self.dtype]), "context_length": self.max_context + SLACK,
            "trust_remote_code": self.trust_remote_code, "weight_version": "0", "incremental_streaming_output": True,
            "sampling_defaults": "openai", "log_level_http": "warning", "tp_size": self.tensor_parallel_size, "random_seed": self.seed,
            "device": self.device, "max_running_requests": self.slots,
        }  # fmt: skip
        return ours | (self._on_cpu() if self.device == "cpu" else self._on_gpu()) | (self.node.options() if self.node else {})

    def _on_cpu(self) -> dict[str, Any]:
        return ON_CPU | {"max_total_tokens": kv_tokens_on_cpu(self.slots, self.max_context)}

    def _on_gpu(self) -> dict[str, Any]:
        """SGLang records graphs of decode steps for as many samples as it thinks a GPU good for, 256 on an H100 and 48 on an RTX 4090; a
        step of more would run without one, at the pace of its host.

        Graphs of prefills are left out: those of 0.5.21 read memory that another of them may have written since (sgl-project/sglang#37606),
        so that tokens are wrong in silence, and what they take of the GPU does not come back in sleep(). rollout.sglang can ask for them.
        """
        saver = {"enable_memory_saver": True} if self.memory_saver else {}
        graphs = {"cuda_graph_max_bs_decode": self.slots, "disable_prefill_cuda_graph": True}
        return {"mem_fraction_static": self.memory_fraction} | graphs | saver


def check(options: dict[str, Any]) -> None:
    """Raises UserError for what SGLang would say only when the weights are loaded, by the failure of a kernel."""
    chosen = {"attention_backend", "prefill_attention_backend", "decode_attention_backend"} & options.keys()
    if options["device"] != "cpu" and options["dtype"] == "float32" and not chosen:
        raise UserError(
            "rollout.precision: fp32: the attention that SGLang chooses on a GPU takes 16-bit numbers only; set rollout.precision to bf16, "
            "or name one that takes fp32: rollout.sglang: {attention_backend: torch_native}"
        )
