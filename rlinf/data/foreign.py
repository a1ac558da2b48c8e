"""`rlinf data import FILE OUT`: makes a training file of a data set whose rows have a question and an answer, under whatever names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlinf.config.schema import DataConfig
from rlinf.data.jsonl import HALF_A_PAIR, BadLine, Fault, atomic_write, describe, is_unicode, refuse_itself
from rlinf.data.prompts import parse_prompt
from rlinf.data.tables import read_rows
from rlinf.errors import UserError

CHAT = DataConfig(apply_chat_template=True)  # takes texts and conversations
SHOWN = 80  # characters of a value in a message


def import_file(
    source: Path,
    out: Path,
    prompt: str,
    answer: str,
    *,
    after: str = "",
    task: str = "math",
    name: str | None = None,
    metadata: str | None = None,
    instruction: str = "",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Write `out`, one record for each row of `source`, and return what was done.

    prompt, answer, name (of the query_id), metadata: fields of the rows; a dot leads into a field that has fields of its own, such as
    `reward_model.ground_truth`. A prompt may be a text, behind which a line with `instruction` is put, or a list of chat messages, which is
    left as it is. An answer is a text, a number, or a list of those, any of which is right; with `after`, what stands in it behind the last
    such mark. name None: the file and the row's number.

    Raises UserError when the file cannot be read, when no row can be used, and, unless skip_bad, when some cannot: it names the first.
    """
    refuse_itself(source, out)
    records, faults, chats = [], [], 0
    for number, row in enumerate(read_rows(source), start=1):
        try:
            if not isinstance(row, Mapping):
                raise BadLine("not an object with fields")
            asked = _at(row, prompt)
            if isinstance(asked, str) and asked.strip() and instruction:
                asked = f"{asked}\n{instruction}"
            record = {
                "prompt": asked, "task": task, "query_id": f"{source.stem}-{number}" if name is None else _at(row, name),
                "solutions": _answers(_at(row, answer), answer, after),
            }  # fmt: skip
            if metadata is not None:
                record["metadata"] = _at(row, metadata)
            records.append(_checked(record, source, number))
            chats += isinstance(asked, list)
        except BadLine as bad:
            faults.append(Fault(str(source), number, str(bad)))
    if faults and (not skip_bad or not records):
        remedy = "name other fields, or fix the rows" + (", or leave them out with --skip-bad" if records else "")
        raise UserError(describe(faults, "cannot be used", f"nothing was written; {remedy}", "row"))
    with atomic_write(out) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    report = {"file": out, "problems": len(records), "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    if faults:
        report["left_out"] = describe(faults, "left out", "", "row").rstrip()
    if chats and instruction:
        report["warning"] = f"{chats} prompts are conversations, and stay as they are: see that they ask for the form of the answer"
    return report


def _at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field. A field whose own name has the dots goes before one inside of another."""
    if name in row:
        return row[name]
    at: Any = row
    for part in name.split("."):
        if not isinstance(at, Mapping) or part not in at:
            raise BadLine(f"no field `{name}`; the row has: {', '.join(map(str, row)) or 'nothing'}")
        at = at[part]
    return at


def _answers(value: Any, name: str, after: str) -> list[str]:
    answers = value if isinstance(value, list) else [value]
    for one in answers:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)) or (isinstance(one, float) and not math.isfinite(one)):
            raise BadLine(f"`{name}` is {repr(value)[:SHOWN]}; it must be a text, a number, or a list of those")
        if after and after not in str(one):
            raise BadLine(f"`{name}` has no {after!r}, behind which the answer would stand: {repr(one)[:SHOWN]}")
    return [str(one).rpartition(after)[2].strip() if after else str(one) for one in answers]


def _checked(record: dict[str, Any], source: Path, number: int) -> dict[str, Any]:
    """The record, when a run would take it. Raises BadLine."""
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # a date, bytes, a number that is not finite
        raise BadLine(f"cannot be written as JSON ({error})") from error
    if not is_unicode(record):
        raise BadLine(HALF_A_PAIR)
    parse_prompt(record, source, number, CHAT)
    return record
