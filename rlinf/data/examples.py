"""Reads examples for supervised fine-tuning from JSONL files: a prompt, and the response that the model is to learn.

An example is represented as a Group with one sample, whose response comes from the file instead of an engine; so it is packed and sent like
any other. A line holds the prompt under data.prompt_key (text, or chat messages) and the response under sft.response_key; or a chat whose
last turn is the assistant's, which is then the response. Prompt and response are tokenized separately, as when the model generates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rlinf.config.schema import Config
from rlinf.data.jsonl import BadLine, Fault, Row, describe, field, read_records
from rlinf.data.prompts import id_of, prompt_of, render_prompt, repetition_warning, unique_ids
from rlinf.data.records import Finish, Group, Prompt, Sample, sample_id
from rlinf.data.tokenizer import Message, TextTokenizer
from rlinf.errors import UserError

TASK = "sft"


@dataclass(frozen=True)
class ExamplesReport:
    """How many lines were used or dropped, and why: read = kept + bad_records + too_long.

    fingerprint: a hash of the ids and tokens of the kept examples, in order.
    """

    read: int
    kept: int
    bad_records: int
    too_long: int
    response_tokens: int
    longest: int
    fingerprint: str

    def describe(self) -> str:
        """One line, in which counts of 0 are left out."""
        parts = [f"{self.kept} of {self.read} examples ({self.response_tokens} response tokens; longest {self.longest} tokens)"]
        parts += [f"longer than runner.seq_length dropped: {self.too_long}"] if self.too_long else []
        parts += [f"bad records skipped: {self.bad_records}"] if self.bad_records else []
        return "; ".join(parts)


@dataclass(frozen=True)
class _Record:
    """A line that could be read."""

    file: str
    line: int
    query_id: str
    prompt: str | tuple[Message, ...]
    response: str


def load_examples(paths: Sequence[str], config: Config, tokenizer: TextTokenizer) -> tuple[list[Group], ExamplesReport]:
    """The examples of all files, in order, and a report about the lines.

    Raises UserError when a file is missing, empty or not JSONL, when lines are bad (unless data.on_bad_record is `skip`), when an example
    is longer than runner.seq_length (unless data.filter_prompt_by_length), and when nothing is left.
    """
    records, faults = read_records(paths, partial(_parse, config=config), config.data.on_bad_record)
    examples, too_long = _tokenize(records, config, tokenizer)
    if too_long and not config.data.filter_prompt_by_length:
        raise UserError(
            describe(too_long, "are too long", "raise runner.seq_length, or set data.filter_prompt_by_length: true to drop them")
        )
    lengths = [(len(g.prompt.token_ids), len(g.samples[0])) for g in examples]
    report = ExamplesReport(
        read=len(records) + len(faults),
        kept=len(examples),
        bad_records=len(faults),
        too_long=len(too_long),
        response_tokens=sum(r for _, r in lengths),
        longest=max((p + r for p, r in lengths), default=0),
        fingerprint=_fingerprint(examples),
    )
    if not examples:
        raise UserError(f"{', '.join(map(str, paths)) or 'no data files given'}: no example is left ({report.describe()})")
    return examples, report


def repeated(training: Iterable[Group], held_out: Sequence[Group]) -> str | None:
    """A warning when held-out examples are also trained on, with the same prompt and response; None when none is."""
    return repetition_warning({_content(g) for g in training}, {g.group_id: _content(g) for g in held_out}, "examples")


def _content(group: Group) -> bytes:
    return group.prompt.token_ids.tobytes() + b"\xff" * 4 + group.samples[0].token_ids.tobytes()  # -1 is no token


def example(name: str, prompt_ids: np.ndarray, response_ids: np.ndarray) -> Group:
    """The group of a prompt and a response, all of whose tokens are in the loss."""
    n = len(response_ids)
    sample = Sample(sample_id(name, 0), response_ids, np.full(n, np.nan, np.float32), np.ones(n, np.uint8), ((0, n),), Finish.STOP)
    return Group(name, Prompt(name, prompt_ids, TASK, ("",)), (sample,))


def _parse(row: Row, path: Path, number: int, config: Config) -> _Record:
    prompt, name = prompt_of(field(row, config.data.prompt_key, "data.prompt_key"), config.data), config.sft.response_key
    if name not in row and isinstance(prompt, tuple) and prompt[-1]["role"] == "assistant":
        prompt, response = prompt[:-1], prompt[-1]["content"]
        if not prompt:
            raise BadLine(f"`{config.data.prompt_key}` holds an assistant's turn alone; a turn before it is what it answers")
    else:
        response = field(row, name, "sft.response_key")
    if not isinstance(response, str) or not response.strip():
        raise BadLine(f"`{name}` is not a text, or is empty")
    return _Record(str(path), number, id_of(row, path, number), prompt, response)


def _tokenize(records: Sequence[_Record], config: Config, tokenizer: TextTokenizer) -> tuple[list[Group], list[Fault]]:
    prompts = tokenizer.encode_batch([render_prompt(r, tokenizer) for r in records])
    responses = tokenizer.encode_batch([r.response for r in records], bos=False)
    names, _ = unique_ids([r.query_id for r in records])
    examples, too_long = [], []
    for name, r, prompt_ids, response_ids in zip(names, records, prompts, responses):
        if config.sft.append_end_token and response_ids[-1] not in tokenizer.eos_token_ids:
            response_ids = [*response_ids, tokenizer.end_token_id]
        length = len(prompt_ids) + len(response_ids)
        if length > config.runner.seq_length:
            too_long.append(Fault(r.file, r.line, f"{length} tokens, runner.seq_length is {config.runner.seq_length}"))
        else:
            examples.append(example(name, np.array(prompt_ids, np.int32), np.array(response_ids, np.int32)))
    return examples, too_long


def _fingerprint(examples: Sequence[Group]) -> str:
    digest = hashlib.sha256()
    for group in examples:
        prompt, response = group.prompt.token_ids, group.samples[0].token_ids
        digest.update(f"{group.group_id}\0{len(prompt)}\0{len(response)}\0".encode())
        digest.update(prompt.tobytes() + response.tobytes())
    return digest.hexdigest()[:16]
