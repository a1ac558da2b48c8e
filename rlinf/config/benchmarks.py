"""The sections `validation` and `evaluation` of the configuration: how problems are sampled for a score, during a run and after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlinf.config.field import key

TOP_P_HELP = "sample from the smallest set with this probability mass; 1 = off"
TOP_K_HELP = "sample among the k most likely tokens; 0 or at least the vocabulary = off"
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
INSTRUCTION_HELP = "line after the question; not used with `raw`"


def template_key(default: str) -> Any:
    chat, r1 = "`chat` = a user turn in the model's chat template", "`r1` = DeepSeek-R1's markers and an open <think>"
    return key(default, f"{chat}; {r1}; `raw` = as the file has it", ("chat", "r1", "raw"))


@dataclass
class ValidationConfig:
    """How the problems of data.val_data_paths are answered during a run."""

    n: int = key(
        1, "answers to each problem; eval/accuracy is the mean over all, eval/pass_at_n the share of problems with a right one", at_least=1
    )
    temperature: float = key(0.0, "softmax temperature; 0 = greedy, so that two steps differ by their weights alone", at_least=0)
    top_p: float = key(1.0, TOP_P_HELP, more_than=0, at_most=1)
    top_k: int = key(0, TOP_K_HELP, at_least=0)
    max_new_tokens: int | None = key(None, "tokens of an answer at most; null = algorithm.sampling_params.max_new_tokens", at_least=1)


@dataclass
class BenchmarkConfig:
    """One set of problems and how it is sampled. The defaults are those of arXiv 2501.12948 for reasoning models."""

    path: str | None = key(None, "JSONL of the problems in the AReaL-boba format (`rlinf data convert`); null = the set is not evaluated")
    n: int = key(32, "samples per problem", at_least=1)
    temperature: float = key(0.6, "softmax temperature; 0 = greedy", at_least=0)
    top_p: float = key(0.95, TOP_P_HELP, more_than=0, at_most=1)
    top_k: int = key(0, TOP_K_HELP, at_least=0)
    max_tokens: int = key(32768, "tokens of a response at most", at_least=1)
    stop: list[str] = key([], "strings that end a response, besides the end token")
    template: str = template_key("chat")
    instruction: str = key(INSTRUCTION, INSTRUCTION_HELP)


@dataclass
class ChoiceConfig(BenchmarkConfig):
    instruction: str = key(
        r"Please reason step-by-step and put your choice letter without any other text with \boxed{} in the end.", INSTRUCTION_HELP
    )


@dataclass
class ShortConfig(BenchmarkConfig):
    n: int = key(4, "samples per problem", at_least=1)


@dataclass
class GreedyConfig(BenchmarkConfig):
    n: int = key(1, "samples per problem", at_least=1)
    temperature: float = key(0.0, "softmax temperature; 0 = greedy", at_least=0)
    top_p: float = key(1.0, TOP_P_HELP, more_than=0, at_most=1)
    max_tokens: int = key(2048, "tokens of a response at most", at_least=1)


@dataclass
class CustomConfig(GreedyConfig):
    template: str = template_key("raw")


@dataclass
class EvaluationConfig:
    output_dir: str = key("./logs/eval", "results go to <output_dir>/<model>/<benchmark>; what is there already is not generated again")
    opencompass_dir: str | None = key(None, "also write the predictions as OpenCompass does, into this work_dir; null = do not")
    aime24: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    aime25: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    gpqa_diamond: ChoiceConfig = field(default_factory=ChoiceConfig)
    math500: ShortConfig = field(default_factory=ShortConfig)
    gsm8k: GreedyConfig = field(default_factory=GreedyConfig)
    custom: CustomConfig = field(default_factory=CustomConfig)


BENCHMARKS = ("aime24", "aime25", "gpqa_diamond", "math500", "gsm8k", "custom")  # the sections of EvaluationConfig
