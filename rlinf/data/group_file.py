"""Writes and reads a group (prompt, samples, verdicts) exactly: as a safetensors file, or as JSON values and arrays for the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rlinf.data.records import Finish, Group, GroupHeader, Prompt, Sample, Status, Verdict
from rlinf.errors import UserError
from rlinf.files import sync

ARRAYS = ("token_ids", "rollout_logprobs", "loss_mask")  # of a sample


def write_group(path: Path, group: Group) -> None:
    """Write the group as a safetensors file, which is synced to disk when this returns."""
    about, arrays = take_apart(group)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata={"group": json.dumps(about)})
    path.write_bytes(content)
    sync(path)


def read_group(path: Path) -> Group:
    """What write_group() wrote. Raises UserError when the file is missing or damaged."""
    try:
        with safe_open(path, "np") as file:
            return put_together(json.loads((file.metadata() or {})["group"]), file.get_tensor)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no group of a run ({error}); the file is missing or damaged") from error


def take_apart(group: Group) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the parts of a group that JSON can hold, its arrays by name)."""
    arrays = {"prompt": group.prompt.token_ids}
    arrays |= {f"{k}.{name}": getattr(sample, name) for k, sample in enumerate(group.samples) for name in ARRAYS}
    prompt, samples = _plain(group.prompt), [_plain(sample) for sample in group.samples]
    verdicts = [verdict and asdict(verdict) for verdict in group.verdicts]
    return {"group_id": group.group_id, "prompt": prompt, "samples": samples, "verdicts": verdicts}, arrays


def put_together(about: Mapping[str, Any], array: Callable[[str], np.ndarray]) -> Group:
    """The group that take_apart() was given. Raises KeyError, TypeError or ValueError when the parts are not those of a group."""
    prompt = Prompt(token_ids=array("prompt"), **about["prompt"] | {"solutions": tuple(about["prompt"]["solutions"])})
    samples = tuple(_sample(s, {name: array(f"{k}.{name}") for name in ARRAYS}) for k, s in enumerate(about["samples"]))
    return Group(about["group_id"], prompt, samples, tuple(v and _verdict(v) for v in about["verdicts"]))


def header_from_json(fields: Mapping[str, Any]) -> GroupHeader:
    """The header whose fields stand in an older checkpoint."""
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    own = {
        "finishes": tuple(map(Finish, fields["finishes"])),
        "versions": tuple(tuple((v, n) for v, n in sample) for sample in fields["versions"]),
        "verdicts": tuple(v and _verdict(v) for v in fields["verdicts"]),
    }
    return GroupHeader(**plain | own)


def _plain(record: Prompt | Sample) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if not isinstance(value, np.ndarray)}


def _sample(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Sample:
    versions = tuple((v, n) for v, n in fields["versions"])  # older files hold fields that nothing read; they are left out
    return Sample(sample_id=fields["sample_id"], versions=versions, finish=Finish(fields["finish"]), **arrays)


def _verdict(fields: Mapping[str, Any]) -> Verdict:
    parts = tuple((name, value) for name, value in fields["parts"])
    failed = tuple((f, "") if isinstance(f, str) else tuple(f) for f in fields.get("failed", ()))  # older files: names alone
    return Verdict(**{**fields, "status": Status(fields["status"]), "parts": parts, "failed": failed})
