"""A set of problems as a model gets it: read from its file, with the protocol of its section, as prompts in the model's template."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.config.benchmarks import BENCHMARKS, BenchmarkConfig
from rlinf.config.schema import Config
from rlinf.data.prompts import load_prompts
from rlinf.data.records import Prompt
from rlinf.data.tokenizer import TextTokenizer
from rlinf.errors import UserError
from rlinf.rewards.tasks import check_tasks

SHARE = 8  # samples of one request: a problem of 32 samples keeps four engines busy; the sampling noise does not depend on their number
R1_MARKERS = ("<｜User｜>", "<｜Assistant｜>")
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Unit:
    """One request: `count` samples of a problem, from sample `first` on. group_id is its name, which stays the same across
    interruptions."""

    group_id: str
    prompt: Prompt
    first: int
    count: int


@dataclass(frozen=True)
class ProblemSet:
    """name: of the folder with its results. section: of the configuration. prompts: in the order of the file. sha256: of the file."""

    name: str
    section: str
    protocol: BenchmarkConfig
    prompts: tuple[Prompt, ...]
    sha256: str

    @property
    def longest_prompt(self) -> int:
        return max(len(p.token_ids) for p in self.prompts)

    def units(self) -> list[Unit]:
        n = self.protocol.n
        return [
            Unit(f"{self.name}/{prompt.prompt_id}/{first}", prompt, first, min(SHARE, n - first))
            for prompt in self.prompts
            for first in range(0, n, SHARE)
        ]

    def protocol_json(self) -> dict[str, Any]:
        return {name: getattr(self.protocol, name) for name in BenchmarkConfig.__dataclass_fields__ if name != "path"}


def load_sets(config: Config, tokenizer: TextTokenizer) -> list[ProblemSet]:
    """The problem sets of every section of `evaluation` that has a path. Raises UserError for files, tasks, names or templates that cannot
    be used."""
    sets = [_load(section, config, tokenizer) for section in BENCHMARKS if getattr(config.evaluation, section).path is not None]
    names = [s.name for s in sets]
    for s in sets:
        if names.count(s.name) > 1:
            raise UserError(
                f"evaluation.{s.section}.path: its results would be named {s.name}, as those of another section; rename the file"
            )
    return sets


def check_context(sets: Sequence[ProblemSet], max_positions: int, model_dir: str) -> int:
    """The largest number of tokens of a prompt with its response, over all sets. Raises UserError when the model's context is too small."""
    for s in sets:
        if s.longest_prompt + s.protocol.max_tokens > max_positions:
            raise UserError(
                f"evaluation.{s.section}.max_tokens = {s.protocol.max_tokens} and the longest prompt ({s.longest_prompt} tokens) exceed "
                f"max_position_embeddings {max_positions} of {model_dir}; lower it to at most {max_positions - s.longest_prompt}"
            )
    return max(s.longest_prompt + s.protocol.max_tokens for s in sets)


def _load(section: str, config: Config, tokenizer: TextTokenizer) -> ProblemSet:
    protocol: BenchmarkConfig = getattr(config.evaluation, section)
    path = Path(str(protocol.path))
    name = section if section != "custom" else path.name.removesuffix(".jsonl")
    data = replace(config.data, apply_chat_template=False, tasks=None, max_prompt_length=UNBOUNDED)
    if section != "custom":  # what a configuration says of its own records is not said of benchmarks
        data = replace(data, prompt_key="prompt", answer_key="solutions", on_bad_record="error")
    found, report = load_prompts([str(path)], data, tokenizer)
    if report.bad_records:
        sys.stderr.write(f"{name}: {report.describe()}\n")
    check_tasks({p.task for p in found}, config.reward.own_tasks, f"take its problems out of {path}")
    _check_template(section, protocol.template, tokenizer)
    texts = [render(p.text, protocol, tokenizer) for p in found]
    prompts = tuple(
        replace(p, text=text, token_ids=np.array(ids, dtype=np.int32)) for p, text, ids in zip(found, texts, tokenizer.encode_batch(texts))
    )
    return ProblemSet(name, section, protocol, prompts, hashlib.sha256(path.read_bytes()).hexdigest())


def render(question: str, protocol: BenchmarkConfig, tokenizer: TextTokenizer) -> str:
    """The prompt of a question as text, up to where the model's answer begins."""
    if protocol.template == "raw":
        return question
    content = f"{question}\n{protocol.instruction}" if protocol.instruction else question
    if protocol.template == "chat":
        return tokenizer.render_chat([{"role": "user", "content": content}])
    user, assistant = R1_MARKERS
    return f"{user}{content}{assistant}<think>\n"


def _check_template(section: str, template: str, tokenizer: TextTokenizer) -> None:
    key = f"evaluation.{section}.template"
    if template == "chat" and not tokenizer.has_chat_template:
        raise UserError(f"{key} is chat, but the model folder has no chat template; set it to raw (finished prompts) or r1")
    without_bos = 0 if tokenizer.bos_token_id is None else 1
    if template == "r1" and any(len(tokenizer.encode(marker)) - without_bos != 1 for marker in R1_MARKERS):
        raise UserError(f"{key} is r1, but {' and '.join(R1_MARKERS)} are not tokens of this model; set it to chat or raw")
