"""Prompts from JSONL files in the AReaL-boba format: one object a line with `prompt`, `task`, `query_id`, `solutions`.

A prompt is taken as it stands (boba prompts carry their chat markers already); the tokenizer adds its BOS, if it has one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.config.schema import DataConfig
from rlinf.data.records import Prompt
from rlinf.data.tokenizer import Message, TextTokenizer
from rlinf.errors import UserError

SHOWN_LINES = 20
MAGIC = {b"\x1f\x8b": "gzip-compressed", b"PAR1": "a Parquet file", b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd-compressed"}


@dataclass(frozen=True)
class DataReport:
    """What became of the lines. read = kept + bad_records + filtered_by_task (all tasks) + filtered_by_length.

    fingerprint: of the ids and tokens of the kept prompts, in order; the sampler refuses to resume over other data.
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
        """One line; what did not happen is not mentioned."""
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
class _Record:
    """A good line. `prompt` is text, or the turns of a chat that the template will wrap."""

    file: str
    line: int
    query_id: str
    task: str
    prompt: str | tuple[Message, ...]
    solutions: tuple[str, ...]


@dataclass(frozen=True)
class _Fault:
    """A line that cannot be used, and why."""

    file: str
    line: int
    reason: str


class _BadLine(Exception):
    """Why a line is not a record; becomes a _Fault."""


def load_prompts(paths: Sequence[str], data: DataConfig, tokenizer: TextTokenizer) -> tuple[list[Prompt], DataReport]:
    """The prompts of all files, in order, and what became of the lines.

    Raises UserError when a file is missing, empty or not JSONL, when lines are bad (unless data.on_bad_record is `skip`), when a
    prompt is too long (unless data.filter_prompt_by_length), and when nothing is left.
    """
    lines = [parsed for path in paths for parsed in _read_file(Path(path).expanduser(), data)]
    faults = [x for x in lines if isinstance(x, _Fault)]
    if faults and data.on_bad_record == "error":
        raise UserError(_describe(faults, "cannot be used", "mend or remove them, or set data.on_bad_record: skip to go on without them"))
    records = [x for x in lines if isinstance(x, _Record)]
    names, renamed = _unique_ids(records)
    wanted = [(name, r) for name, r in zip(names, records) if data.tasks is None or r.task in data.tasks]
    prompts, too_long = _tokenize(wanted, data, tokenizer)
    if too_long and not data.filter_prompt_by_length:
        raise UserError(_describe(too_long, "are too long", "raise data.max_prompt_length, or set data.filter_prompt_by_length: true to drop them"))
    report = DataReport(
        read=len(lines),
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
        raise UserError(f"{', '.join(map(str, paths)) or 'no data files given'}: no prompt is left ({report.describe()})")
    return prompts, report


def _read_file(path: Path, data: DataConfig) -> Iterator[_Record | _Fault]:
    if not path.is_file():
        raise UserError(f"{path}: no such data file" if not path.exists() else f"{path}: not a file; give the JSONL files themselves")
    with open(path, "rb") as file:
        _check_start(path, file.read(4096))
        file.seek(0)
        empty = True
        for number, raw in enumerate(file, start=1):  # split at \n only: JSON strings may hold other line separators as they are
            if not raw.strip():
                continue
            empty = False
            try:
                yield _parse(raw.removeprefix(b"\xef\xbb\xbf"), path, number, data)
            except _BadLine as bad:
                yield _Fault(str(path), number, str(bad))
    if empty:
        raise UserError(f"{path}: the file is empty")


def _check_start(path: Path, start: bytes) -> None:
    """Refuse what is no JSONL at all, in one sentence instead of one for each line."""
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {kind}; give it as plain JSONL (one JSON object a line)")
    if b"\0" in start:
        raise UserError(f"{path}: not a text file; give JSONL in UTF-8 (one JSON object a line)")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise UserError(f"{path}: a JSON array, not JSONL; write one object a line, for example with `jq -c '.[]'`")


def _parse(raw: bytes, path: Path, number: int, data: DataConfig) -> _Record:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _BadLine(f"not JSON ({error.msg}, column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise _BadLine(f"not readable ({error})") from error
    if not isinstance(row, dict):
        raise _BadLine("not a JSON object")
    if b"\\ud" in raw.lower() and not _is_unicode(row):
        raise _BadLine("holds half a surrogate pair, which is no character")
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise _BadLine("`task` is not a string")
    return _Record(
        file=str(path),
        line=number,
        query_id=_query_id(row, path, number),
        task=task or "math",
        prompt=_prompt(_field(row, data.prompt_key, "data.prompt_key"), data),
        solutions=_solutions(_field(row, data.answer_key, "data.answer_key"), data.answer_key),
    )


def _is_unicode(row: dict[str, Any]) -> bool:
    """JSON may escape half a surrogate pair; no tokenizer takes that."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _field(row: dict[str, Any], name: str, key: str) -> Any:
    if name not in row:
        raise _BadLine(f"no field `{name}` ({key}); the line has: {', '.join(row) or 'nothing'}")
    return row[name]


def _query_id(row: dict[str, Any], path: Path, number: int) -> str:
    query_id = row.get("query_id")
    if query_id is None:
        return f"{path.name}:{number}"
    if isinstance(query_id, bool) or not isinstance(query_id, (str, int, float)):
        raise _BadLine("`query_id` is neither a string nor a number")
    return str(query_id)


def _prompt(value: Any, data: DataConfig) -> str | tuple[Message, ...]:
    name = data.prompt_key
    if isinstance(value, str):
        if not value.strip():
            raise _BadLine(f"`{name}` is empty")
        return ({"role": "user", "content": value},) if data.apply_chat_template else value
    if not isinstance(value, list):
        raise _BadLine(f"`{name}` is neither a string nor a list of chat messages")
    if not data.apply_chat_template:
        raise _BadLine(f"`{name}` is a list of chat messages, which needs data.apply_chat_template: true")
    well_formed = all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    if not value or not well_formed:
        raise _BadLine(f"`{name}` must hold chat messages, each with the strings `role` and `content`")
    return tuple(value)


def _solutions(value: Any, name: str) -> tuple[str, ...]:
    """A list of accepted answers; a single string counts as a list of one."""
    solutions = [value] if isinstance(value, str) else value
    if not isinstance(solutions, list) or not all(isinstance(s, str) for s in solutions):
        raise _BadLine(f"`{name}` is not a list of strings")
    if not solutions:
        raise _BadLine(f"`{name}` is an empty list: no answer could ever be right")
    if not all(s.strip() for s in solutions):
        raise _BadLine(f"`{name}` holds an empty string")
    return tuple(solutions)


def _unique_ids(records: list[_Record]) -> tuple[list[str], int]:
    """Ids in the order of the records; the second and later bearers of an id get their place among all records appended."""
    taken = {r.query_id for r in records}
    seen: set[str] = set()
    names, renamed = [], 0
    for index, record in enumerate(records):
        name = record.query_id
        if name in seen:
            renamed += 1
            name = f"{name}@idx:{index}"
            while name in taken:
                name += "'"
            taken.add(name)
        seen.add(record.query_id)
        names.append(name)
    return names, renamed


def _tokenize(named: list[tuple[str, _Record]], data: DataConfig, tokenizer: TextTokenizer) -> tuple[list[Prompt], list[_Fault]]:
    texts = [r.prompt if isinstance(r.prompt, str) else tokenizer.render_chat(r.prompt) for _, r in named]
    prompts, too_long = [], []
    for (name, r), text, ids in zip(named, texts, tokenizer.encode_batch(texts)):
        if len(ids) > data.max_prompt_length:
            too_long.append(_Fault(r.file, r.line, f"{len(ids)} tokens, data.max_prompt_length is {data.max_prompt_length}"))
            continue
        metadata = {"file": r.file, "line": r.line}
        prompts.append(Prompt(name, np.array(ids, dtype=np.int32), r.task, r.solutions, text, metadata))
    return prompts, too_long


def _describe(faults: list[_Fault], what: str, remedy: str) -> str:
    shown = [f"  {fault.file}, line {fault.line}: {fault.reason}" for fault in faults[:SHOWN_LINES]]
    if len(faults) > SHOWN_LINES:
        shown.append(f"  and {len(faults) - SHOWN_LINES} more")
    subject = "1 data line" if len(faults) == 1 else f"{len(faults)} data lines"
    return "\n".join([f"{subject} {what}:", *shown, remedy])


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\0{len(prompt.token_ids)}\0".encode())
        digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()[:16]
