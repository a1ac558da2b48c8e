"""Every group of a step as it was generated and judged: samples/groups_NNNNNN.jsonl, a line a group, from which it comes back to the bit.

Arrays are base64 of little-endian numbers: about 11 bytes a token. A line is written by the worker that judged the group.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.data.records import Finish, Group, Prompt, Sample, Status, Verdict
from rlinf.errors import UserError

TYPES = {"token_ids": "<i4", "rollout_logprobs": "<f4", "loss_mask": "|u1"}


def journal_of(samples: Path) -> Path | None:
    """samples/groups_000012.jsonl for samples/step_000012.jsonl; None for validation, which is never trained on."""
    kind, _, step = samples.name.partition("_")
    return samples.with_name(f"groups_{step}") if kind == "step" else None


def group_line(group: Group) -> str:
    prompt = vars(group.prompt) | {"token_ids": _pack(group.prompt.token_ids, "token_ids")}
    samples = [vars(s) | {name: _pack(getattr(s, name), name) for name in TYPES} for s in group.samples]
    verdicts = [verdict and asdict(verdict) for verdict in group.verdicts]
    return json.dumps({"group_id": group.group_id, "prompt": prompt, "samples": samples, "verdicts": verdicts}, ensure_ascii=False)


def read_groups(path: Path) -> Iterator[Group]:
    """In the order in which they were judged; a torn last line is left out. Raises UserError that names a line which is damaged."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield _group(line, f"{path}:{number}")


def _group(line: str, where: str) -> Group:
    try:
        row = json.loads(line)
        prompt = Prompt(**_arrays(row["prompt"]) | {"solutions": tuple(row["prompt"]["solutions"])})
        return Group(row["group_id"], prompt, tuple(_sample(s) for s in row["samples"]), tuple(v and _verdict(v) for v in row["verdicts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: is no group of a run ({error}); the file is damaged, and its step cannot be replayed") from error


def _sample(row: Mapping[str, Any]) -> Sample:
    versions = tuple((version, n) for version, n in row["versions"])
    return Sample(**{**_arrays(row), "finish": Finish(row["finish"]), "versions": versions, "steps": tuple(row["steps"])})


def _verdict(row: Mapping[str, Any]) -> Verdict:
    return Verdict(**{**row, "status": Status(row["status"]), "parts": tuple((name, value) for name, value in row["parts"])})


def _pack(array: np.ndarray, name: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, TYPES[name]).tobytes()).decode()


def _arrays(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.frombuffer(base64.b64decode(v), TYPES[name]) if name in TYPES else v for name, v in row.items()}
