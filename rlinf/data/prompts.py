"""Reads prompts from JSONL files in the AReaL-boba format: one object a line with `prompt`, `task`, `query_id`, `solutions`; and
`metadata` for functions of the user's own.

A prompt is used as it is written in the file (boba prompts already contain their chat markers); the tokenizer adds its BOS, if it has one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.config.schema import DataConfig
from rlinf.data.jsonl import BadLine, Fault, Row, describe, field, read_records
from rlinf.data.records import Prompt
from rlinf.data.tokenizer import BadChat, Message, TextTokenizer
from rlinf.errors import UserError

SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class DataReport:
    """How many lines were used or dropped, and why. read = kept + bad_records + filtered_by_task (all tasks) + filtered_by_length.

    fingerprint: a hash of the ids and tokens of the kept prompts, in order; the sampler refuses to resume with other data.
    """

    read: int
    kept: int
    tasks: dict[str, int]
    filtered_by_task: dict[str, int]
    filtered_by_length: int
    bad_records: int
    duplicates_renamed: int
    longest_prompt: int
    fingerprint: str

    def describe(self) -> str:
        """One line, in which counts of 0 are left out."""
        tasks = ", ".join(f"{task} {n}" for task, n in sorted(self.tasks.items()))
        parts = [f"{self.kept} of {self.read} prompts ({tasks}; longest {self.longest_prompt} tokens)"]
        if self.filtered_by_task:
            parts.append("other tasks dropped: " + ", ".join(f"{task} {n}" for task, n in sorted(self.filtered_by_task.items())))
        for count, meaning in (
            (self.filtered_by_length, "longer than data.max_prompt_length dropped"),
            (self.bad_records, "bad records skipped"),
            (self.duplicates_renamed, "duplicate query_ids renamed"),
        ):
            if count:
                parts.append(f"{meaning}: {count}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Record:
    """A line that could be read. prompt: text, or the turns of a chat, to which the chat template will be applied."""

    file: str
    line: int
    query_id: str
    task: str
    prompt: str | tuple[Message, ...]
    solutions: tuple[str, ...]
    metadata: Any


def load_prompts(paths: Sequence[str], data: DataConfig, tokenizer: TextTokenizer) -> tuple[list[Prompt], DataReport]:
    """The prompts of all files, in order, and a report about the lines.

    Raises UserError when a file is missing, empty or not JSONL, when lines are bad (unless data.on_bad_record is `skip`), when a
    prompt is too long (unless data.filter_prompt_by_length), and when nothing is left.
    """
    records, faults = read_records(paths, partial(parse_prompt, data=data), data.on_bad_record)
    names, renamed = unique_ids([r.query_id for r in records])
    wanted = [(name, r) for name, r in zip(names, records) if data.tasks is None or r.task in data.tasks]
    prompts, too_long = _tokenize(wanted, data, tokenizer)
    if too_long and not data.filter_prompt_by_length:
        raise UserError(
            describe(
                [fault for _, fault in too_long],
                "are too long",
                "raise data.max_prompt_length, or set data.filter_prompt_by_length: true to drop them",
            )
        )
    report = DataReport(
        read=len(records) + len(faults),
        kept=len(prompts),
        tasks=dict(Counter(p.task for p in prompts)),
        filtered_by_task=dict(Counter(r.task for r in records if data.tasks is not None and r.task not in data.tasks)),
        filtered_by_length=len(too_long),
        bad_records=len(faults),
        duplicates_renamed=renamed,
        longest_prompt=max((len(p.token_ids) for p in prompts), default=0),
        fingerprint=_fingerprint(prompts),
    )
    if not prompts:
        why = _why_none(report, data, min((length for length, _ in too_long), default=0))
        raise UserError(f"{', '.join(map(str, paths)) or 'no data files given'}: no prompt is left: {why}")
    return prompts, report


def repeated(training: Iterable[Prompt], held_out: Sequence[Prompt]) -> str | None:
    """A warning when held-out prompts are also trained on; None when none is. Two prompts are the same when their tokens are."""
    return repetition_warning({p.token_ids.tobytes() for p in training}, {p.prompt_id: p.token_ids.tobytes() for p in held_out}, "prompts")


def repetition_warning(training: Set[bytes], held_out: Mapping[str, bytes], what: str) -> str | None:
    """A warning when contents of `held_out` (id -> content) are in `training`; None when none is. what: the word for the items."""
    both = [name for name, content in held_out.items() if content in training]
    if not both:
        return None
    return (
        f"warning: {len(both)} of {len(held_out)} {what} of data.val_data_paths are in data.train_data_paths too, the first is {both[0]}: "
        "what is measured on them is what was seen, not what was learnt"
    )


def _why_none(report: DataReport, data: DataConfig, shortest: int) -> str:
    if shortest:
        return f"raise data.max_prompt_length ({data.max_prompt_length}): the shortest prompt has {shortest} tokens"
    if report.filtered_by_task:
        found = ", ".join(f"{task} {n}" for task, n in sorted(report.filtered_by_task.items()))
        return f"data.tasks names {', '.join(data.tasks or [])}; the files hold {found}"
    return f"none of the {report.read} lines can be used; set data.on_bad_record: error to be told why"


def parse_prompt(row: Row, path: Path, number: int, data: DataConfig) -> Record:
    """The record in a row. Raises BadLine when the row cannot be trained on."""
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise BadLine("`task` is not a string")
    return Record(
        file=str(path),
        line=number,
        query_id=id_of(row, path, number),
        task=task or "math",
        prompt=prompt_of(field(row, data.prompt_key, "data.prompt_key"), data),
        solutions=_solutions(field(row, data.answer_key, "data.answer_key"), data.answer_key),
        metadata=row.get("metadata"),
    )


def id_of(row: Row, path: Path, number: int) -> str:
    """The record's own id; without one, its place FILE:LINE."""
    query_id = row.get("query_id")
    if query_id is None:
        return f"{path.name}:{number}"
    if isinstance(query_id, bool) or not isinstance(query_id, (str, int, float)):
        raise BadLine("`query_id` is neither a string nor a number")
    return str(query_id)


def prompt_of(value: Any, data: DataConfig) -> str | tuple[Message, ...]:
    """Checks the value of a prompt field: returns text, or with data.apply_chat_template the turns of a chat. Raises BadLine."""
    name = data.prompt_key
    if isinstance(value, str):
        if not value.strip():
            raise BadLine(f"`{name}` is empty")
        return ({"role": "user", "content": value},) if data.apply_chat_template else value
    if not isinstance(value, list):
        raise BadLine(f"`{name}` is neither a string nor a list of chat messages")
    if not data.apply_chat_template:
        raise BadLine(f"`{name}` is a list of chat messages, which needs data.apply_chat_template: true")
    well_formed = all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    if not value or not well_formed:
        raise BadLine(f"`{name}` must hold chat messages, each with the strings `role` and `content`")
    return tuple(value)


def _solutions(value: Any, name: str) -> tuple[str, ...]:
    """A list of accepted answers; a single string counts as a list of one."""
    solutions = [value] if isinstance(value, str) else value
    if not isinstance(solutions, list) or not all(isinstance(s, str) for s in solutions):
        raise BadLine(f"`{name}` is not a list of strings but {json.dumps(value)[:SHOWN]}; write {_as_text(value)}")
    if not solutions:
        raise BadLine(f"`{name}` is an empty list: no answer could ever be right")
    if not all(s.strip() for s in solutions):
        raise BadLine(f"`{name}` holds an empty string")
    return tuple(solutions)


def _as_text(value: Any) -> str:
    """How solutions that are numbers are written as text; an example where they are something else."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(s, (str, int, float)) and not isinstance(s, bool) for s in items):
        return json.dumps([s if isinstance(s, str) else json.dumps(s) for s in items])[:SHOWN]
    return 'the answers as text, such as ["2"]'


def unique_ids(ids: Sequence[str]) -> tuple[list[str], int]:
    """(unique names in the order of `ids`, how many differ from their id): when an id repeats, all but its first get their index added."""
    taken = set(ids)
    seen: set[str] = set()
    names, renamed = [], 0
    for index, own in enumerate(ids):
        name = own
        if name in seen:
            renamed += 1
            name = f"{name}@idx:{index}"
            while name in taken:
                name += "'"
            taken.add(name)
        seen.add(own)
        names.append(name)
    return names, renamed


def short_names(files: Iterable[str]) -> dict[str, str]:
    """file -> its name without folder and ending, of letters, digits, `_`, `.` and `-`, since it becomes part of a curve's name; with `-2`,
    `-3` and so on where an earlier file has that name already."""
    names: dict[str, str] = {}
    for file in dict.fromkeys(files):
        stem, taken, n = re.sub(r"[^\w.-]", "_", Path(file).stem, flags=re.ASCII), set(names.values()), 1
        while (name := f"{stem}-{n}" if n > 1 else stem) in taken:
            n += 1
        names[file] = name
    return names


def _tokenize(named: list[tuple[str, Record]], data: DataConfig, tokenizer: TextTokenizer) -> tuple[list[Prompt], list[tuple[int, Fault]]]:
    """(prompts, those that are too long as (number of tokens, fault))."""
    texts, sources = [render_prompt(r, tokenizer) for _, r in named], short_names(r.file for _, r in named)
    prompts, too_long = [], []
    for (name, r), text, ids in zip(named, texts, tokenizer.encode_batch(texts)):
        if len(ids) > data.max_prompt_length:
            fault = Fault(r.file, r.line, f"{len(ids)} tokens, data.max_prompt_length is {data.max_prompt_length}")
            too_long.append((len(ids), fault))
            continue
        prompts.append(Prompt(name, np.array(ids, dtype=np.int32), r.task, r.solutions, text, sources[r.file], r.metadata))
    return prompts, too_long


def render_prompt(record: Any, tokenizer: TextTokenizer) -> str:
    """The prompt of a record as text, with the chat template applied to a chat. record: has `prompt`, `file` and `line`."""
    if isinstance(record.prompt, str):
        return record.prompt
    try:
        return tokenizer.render_chat(record.prompt)
    except BadChat as error:
        raise UserError(f"{record.file}, line {record.line}: {error}; fix the line, or the template in the model folder") from error


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\0{len(prompt.token_ids)}\0".encode())
        digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()[:16]


def problems_fingerprint(prompts: Iterable[Prompt]) -> str:
    """A hash of ids, prompt tokens, tasks and solutions, in order: scores on problems with the same fingerprint can be compared."""
    digest = hashlib.sha256()
    for p in prompts:
        digest.update(json.dumps([p.prompt_id, p.task, p.solutions, p.token_ids.tolist()]).encode())
    return digest.hexdigest()[:16]
