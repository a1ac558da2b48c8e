"""Limits that both engines check: the context length of the model, and requests that cannot run."""

from __future__ import annotations

from rlinf.config.model import load_model_config
from rlinf.errors import UserError
from rlinf.rollout.contract import GenerateRequest
from rlinf.weights.architecture import Architecture, read_architecture

SLACK = 8  # context positions that SGLang's server gets beyond those that requests use, because it keeps some for itself
CPU_KV_TOKENS = 65_536


def kv_tokens_on_cpu(slots: int, max_context: int) -> int:
    """Tokens of the KV cache of an SGLang server on CPU: what all slots need, up to a bound, but one whole sample at least."""
    return max(max_context + SLACK, min(slots * (max_context + SLACK), CPU_KV_TOKENS))


def architecture_for(model_dir: str, max_context: int) -> Architecture:
    """The model's shape. Raises UserError when it has fewer positions than max_context."""
    arch = read_architecture(load_model_config(model_dir), f"{model_dir}/config.json")
    if max_context > arch.max_positions:
        limit = f"max_position_embeddings {arch.max_positions} of {model_dir}/config.json"
        raise UserError(f"runner.seq_length {max_context} exceeds {limit}; lower it")
    return arch


def check_request(request: GenerateRequest, max_context: int, vocab: int) -> None:
    """Raise ValueError when a request has no tokens, too many tokens, or tokens outside the vocabulary."""
    if len(request.prompt_ids) == 0:
        raise ValueError(f"request {request.request_id}: empty prompt")
    longest = len(request.prompt_ids) + max((len(p) for p in request.prefixes), default=0)
    if longest >= max_context:
        raise ValueError(f"request {request.request_id}: {longest} tokens of prompt and prefix leave no room in a context of {max_context}")
    for tokens in (request.prompt_ids, *request.prefixes):
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            raise ValueError(f"request {request.request_id}: token ids outside the vocabulary of {vocab}")
