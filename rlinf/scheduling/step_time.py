"""Expected seconds of each phase of a step, from a roofline model: numbers of the data sheets times the shares below, which practice
reaches.

It ignores failures, contention, and stragglers beyond one full-length response. Use it for orders of magnitude and comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlinf.config.schema import ActorModelConfig, Config
from rlinf.scheduling.devices import Device
from rlinf.scheduling.flops import recomputed_layers
from rlinf.scheduling.memory import BYTES, EngineMemory, rank_parameters, trained_parameters
from rlinf.weights.architecture import Architecture

MATRIX_SHARE = 0.4  # of the data sheet's operations, in training and prefill
BANDWIDTH_SHARE = 0.6  # of the memory's bandwidth, in decoding and in the optimizer
WIRE_SHARE = 0.7  # of a link's or network's bandwidth
LAUNCH_SECONDS = 0.003  # of one decode step besides its arithmetic: scheduling, sampling, replaying the graph
MEAN_SHARE = 0.35  # mean response length / max_new_tokens, when none is given
SQUARE_SHARE = 1.5  # mean of squared lengths / square of the mean length: lengths vary


@dataclass(frozen=True)
class Load:
    """The work of one step: number of samples and prompts, mean tokens of a prompt and of a response."""

    samples: int
    prompts: int
    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        """Tokens in training, where the samples of a prompt share one copy of it."""
        return self.samples * self.response + self.prompts * self.prompt


def step_load(config: Config, mean_response: int | None) -> Load:
    """The work of a step, where a prompt is taken to have half of data.max_prompt_length. mean_response: None = MEAN_SHARE of
    max_new_tokens."""
    longest = config.algorithm.sampling_params.max_new_tokens
    response = mean_response or max(1, int(longest * MEAN_SHARE))
    prompts = config.data.rollout_batch_size
    return Load(prompts * config.algorithm.group_size, prompts, max(1, config.data.max_prompt_length // 2), min(response, longest))


def decode_seconds(arch: Architecture, config: Config, device: Device, engine: EngineMemory, running: int, context: float) -> float:
    """Seconds of one decode step of an engine with `running` samples of `context` tokens: of reading memory or of computing, whichever
    takes longer."""
    tp = config.rollout.tensor_parallel_size
    read = (engine.weights + running * context * engine.kv_token) / (device.bandwidth * BANDWIDTH_SHARE)
    operations = 2 * running * _parameters(arch) / tp / (device.flops * MATRIX_SHARE)
    exchanged = 2 * arch.n_layers * running * arch.hidden * 2 / (device.link * WIRE_SHARE) if tp > 1 else 0.0
    return max(read, operations) + exchanged + LAUNCH_SECONDS


def rollout_seconds(
    arch: Architecture, config: Config, device: Device, engine: EngineMemory, engines: int, kv_tokens: int, load: Load
) -> float:
    """Seconds to generate all samples: first all engines decode the mean response, then the longest response goes on alone."""
    share = -(-load.samples // engines)
    running = max(1, min(config.rollout.max_running_requests, kv_tokens // (load.prompt + load.response), share))
    context = load.prompt + load.response / 2
    body = share * load.response / running * decode_seconds(arch, config, device, engine, running, context)
    tail = config.algorithm.sampling_params.max_new_tokens - load.response
    prefill = (
        2 * _parameters(arch) * load.prompts * load.prompt / engines / (config.rollout.tensor_parallel_size * device.flops * MATRIX_SHARE)
    )
    return prefill + body + tail * decode_seconds(arch, config, device, engine, 1, load.prompt + load.response + tail / 2)


def role_seconds(arch: Architecture, config: Config, role: str, device: Device, ranks: int, load: Load) -> dict[str, float]:
    """Seconds of each part of a step in which the model of one of config.megatron_roles is at work. The actor's log-probabilities are those
    of the old (and of the reference) policy."""
    forward, algorithm = forward_seconds(arch, config, role, device, ranks, load), config.algorithm
    if role == "token_reward":
        return {"token rewards": forward}
    passes_of_update = 2 if getattr(config, role).lora.rank else 3  # with adapters there are no gradients of the other weights
    update = algorithm.update_epochs * (passes_of_update + recomputed_layers(getattr(config, role).model, arch.n_layers)) * forward
    optimizer = optimizer_seconds(arch, config, role, device, ranks)
    if role == "critic":
        return {"values": forward, "critic's update": update + optimizer}
    passes = (algorithm.n_minibatches - 1) / algorithm.n_minibatches * algorithm.recompute_logprobs + (algorithm.kl_beta > 0)
    return {"log-probabilities": passes * forward, "forward and backward": update, "optimizer": optimizer}


def forward_seconds(arch: Architecture, config: Config, role: str, device: Device, ranks: int, load: Load) -> float:
    """Seconds of one forward pass of a role's model over all tokens of a step, pipeline bubbles included."""
    model: ActorModelConfig = getattr(config, role).model
    head = arch.vocab * arch.hidden
    length = load.prompt + load.response
    attention = 2 * arch.n_layers * arch.n_heads * arch.head_dim * length * SQUARE_SHARE  # a token's, forward, causal
    tables = (0 if arch.tied else head) + (head if config.head_of(role) == "scalar" else 0)  # that no token is multiplied with
    speed = ranks * device.flops * MATRIX_SHARE * (0.5 if BYTES[model.precision] == 4 else 1.0)
    minibatches = 1 if role == "token_reward" else config.algorithm.n_minibatches
    micro_batches = load.tokens / (model.data_parallel_size(ranks) * minibatches * config.runner.max_tokens_per_mbs)
    bubble = 1 + (model.pipeline_model_parallel_size - 1) / max(1.0, micro_batches)
    return load.tokens * (2 * (_parameters(arch) - tables) + attention) / speed * bubble


def optimizer_seconds(arch: Architecture, config: Config, role: str, device: Device, ranks: int) -> float:
    """Seconds of all optimizer steps of a step, in which ranks exchange gradients and weights."""
    model: ActorModelConfig = getattr(config, role).model
    holders = model.data_parallel_size(ranks) * model.context_parallel_size  # of the same weights
    parameters = trained_parameters(arch, config, role, 0)
    wire = device.network if ranks > config.cluster.num_gpus_per_node else device.link
    exchanged = parameters * (4 + BYTES[model.precision]) * (holders - 1) / holders / (wire * WIRE_SHARE)
    stepped = 28 * parameters / holders / (device.bandwidth * BANDWIDTH_SHARE)  # three fp32 states and the gradient, read and written
    return config.algorithm.update_epochs * config.algorithm.n_minibatches * (exchanged + stepped)


def sync_seconds(arch: Architecture, config: Config, device: Device, moved: int, across_nodes: bool) -> float:
    """Seconds to bring weights through host memory to every engine, and to offload `moved` bytes and bring them back."""
    weights = _parameters(arch) * BYTES[config.rollout.precision or config.actor.model.precision]
    wire = device.network if across_nodes else device.host
    return 2 * weights / (device.host * WIRE_SHARE) + weights / (wire * WIRE_SHARE) + 2 * moved / (device.host * WIRE_SHARE)


def _parameters(arch: Architecture) -> int:
    return rank_parameters(arch, 1, 1, 0)
