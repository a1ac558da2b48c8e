"""The compressed parts of the page, which hold the samples of each step and the texts of some of them; and which parts are dropped when not
all fit."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Sequence
from typing import Any

from rlinf.report.run_data import SampleFile

MAX_TEXT_STEPS = 60
TEXTS_A_STEP = 8
PROMPT_TAIL, ANSWER_HEAD = 240, 80  # characters in the list of samples
HEADERS_SHARE = 0.6  # of the room, at most, for the lists of samples


class Parts:
    """headers: file label -> part. texts: (file label, line) -> part, the most important first."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.samples: dict[str, int] = {}
        self.texts: dict[tuple[str, int], str] = {}
        self.ranks: dict[tuple[str, int], int] = {}
        self.dropped_texts = 0

    def add_headers(self, file: SampleFile, rows: Sequence[dict[str, Any]]) -> None:
        groups: dict[str, dict[str, Any]] = {}
        for row in rows:
            head = {"task": row["task"], "prompt": tail(row["prompt"]), "solutions": cut(" or ".join(row["solutions"])), "samples": []}
            groups.setdefault(row["group_id"], head)["samples"].append(sample_header(row))
        self.headers[file.label] = compress(list(groups.values()))
        self.samples[file.label] = len(rows)

    def add_texts(self, file: SampleFile, rows: Sequence[dict[str, Any]]) -> None:
        for rank, row in enumerate(most_telling(rows, file.step)):
            key = (file.label, row["line"])
            self.texts[key], self.ranks[key] = compress(sample_text(row)), rank

    def fit(self, room: int, chosen: Sequence[SampleFile]) -> None:
        """Drop parts until at most `room` bytes are left: first the lists of samples of steps without texts (every other one, repeatedly),
        then the steps between the first and the last with their texts, then texts, the least telling first."""
        keep = [file.label for file in chosen if file.label in self.headers]
        for spare in [label for label in self.headers if label not in keep], keep[1:-1]:
            while spare and size(self.headers) > HEADERS_SHARE * room:
                for label in spare[1::2] or spare:
                    del self.headers[label]
                spare = [label for label in spare if label in self.headers]
        without_list = [key for key in self.texts if key[0] not in self.headers]
        for key in without_list:
            del self.texts[key]
        self.dropped_texts += len(without_list)
        left = room - size(self.headers)
        for key in sorted(self.texts, key=lambda k: self.ranks[k]):  # the first choice of every step, then the second ...
            left -= len(self.texts[key]) + 80
            if left < 0:
                del self.texts[key]
                self.dropped_texts += 1

    def describe(self, file: SampleFile) -> dict[str, Any]:
        texts = sum(label == file.label for label, _ in self.texts)
        count = self.samples.get(file.label, 0)
        return {
            "label": file.label,
            "step": file.step,
            "validation": file.validation,
            "samples": count,
            "texts": texts,
            "path": f"samples/{file.path.name}",
        }

    def html(self) -> str:
        """An inert element for each part. Base64 contains no character that could end the element."""
        named = {f"h-{label}": part for label, part in self.headers.items()} | {
            f"t-{label}-{line}": part for (label, line), part in self.texts.items()
        }
        return "\n".join(f'<script type="text/plain" id="{name}">{part}</script>' for name, part in named.items())


def choose_files(files: Sequence[SampleFile], flagged: set[int]) -> list[SampleFile]:
    """The files whose texts are shown: the first and the last, those of flagged steps, the first and last validation, and evenly spaced
    others."""
    steps, validations = [f for f in files if not f.validation], [f for f in files if f.validation]
    chosen = dict.fromkeys([*steps[:1], *steps[-1:], *validations[:1], *validations[-1:], *(f for f in steps if f.step in flagged)])
    free = max(0, MAX_TEXT_STEPS - len(chosen))
    chosen |= dict.fromkeys(steps[round(i * (len(steps) - 1) / (free + 1))] for i in range(1, free + 1) if steps)
    return sorted(list(chosen)[:MAX_TEXT_STEPS], key=lambda f: (f.step, f.validation))


def most_telling(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The best sample, the worst, the one with the largest gap, an undecided one, then others; those whose tokens were written down come
    first."""
    detailed = [r for r in rows if "pieces" in r["trained"]]
    pool = detailed or list(rows)

    def score(row: dict[str, Any]) -> float:
        advantage = row["trained"].get("advantage")
        return row["reward"] if advantage is None else advantage

    first = [max(pool, key=score), min(pool, key=score), max(pool, key=lambda r: r["trained"].get("gap_max") or 0.0)] if pool else []
    first += [r for r in rows if r["status"] == "undecided"][:1]
    others = detailed or random.Random(seed).sample(pool, min(len(pool), TEXTS_A_STEP))
    return list({r["line"]: r for r in [*first, *others]}.values())[:TEXTS_A_STEP]


def sample_header(row: dict[str, Any]) -> dict[str, Any]:
    trained, versions = row["trained"], [version for version, _ in row["versions"]]
    return {
        "line": row["line"],
        "id": row["sample_id"],
        "status": row["status"],
        "reward": row["reward"],
        "length": row["length"],
        "finish": row["finish"],
        "route": row["route"],
        "extracted": None if row["extracted"] is None else cut(row["extracted"]),
        "oldest": min(versions, default=None),
        "newest": max(versions, default=None),
        "advantage": trained.get("advantage"),
        "gap": trained.get("gap_max"),
        "ratio": trained.get("ratio_mean"),
    }


def sample_text(row: dict[str, Any]) -> dict[str, Any]:
    trained = row["trained"]
    text = {"prompt": row["prompt"], "reason": row["reason"], "rewarded": [*row["parts"].items()]}
    if "pieces" in trained:
        return text | {name: trained[name] for name in ("pieces", "advantages", "log_ratios", "gaps")}
    return text | {"response": row["response"]}


def tail(prompt: str) -> str:
    """The end of a prompt, which distinguishes it from the others better than its start."""
    return prompt if len(prompt) <= PROMPT_TAIL else "…" + prompt[-PROMPT_TAIL:]


def cut(answer: str) -> str:
    return answer if len(answer) <= ANSWER_HEAD else answer[:ANSWER_HEAD] + "…"


def compress(value: Any) -> str:
    return base64.b64encode(
        gzip.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"), mtime=0)
    ).decode()


def size(parts: dict[str, str]) -> int:
    return sum(map(len, parts.values())) + 80 * len(parts)
