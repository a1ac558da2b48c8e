"""What the `algorithm` section asks of an engine."""

from __future__ import annotations

from rlinf.config.schema import AlgorithmConfig
from rlinf.data.tokenizer import TextTokenizer
from rlinf.rollout.contract import SamplingParams, Stop


def sampling_of(algorithm: AlgorithmConfig) -> SamplingParams:
    s = algorithm.sampling_params
    return SamplingParams(s.temperature, s.top_p, s.top_k)


def validation_sampling() -> SamplingParams:
    """Validation in the loop is greedy: one answer a problem, the same problems every time, so that two steps compare in pairs."""
    return SamplingParams(temperature=0.0)


def stop_of(algorithm: AlgorithmConfig, tokenizer: TextTokenizer) -> Stop:
    return Stop(token_ids=tuple(tokenizer.eos_token_ids), strings=tuple(algorithm.sampling_params.stop))
