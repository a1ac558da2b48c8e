"""The reward worker: decodes the responses of a group, judges them, and writes samples and journal."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

from rlinf.config.schema import Config
from rlinf.data.group_file import read_group, write_group
from rlinf.data.journal import group_line
from rlinf.data.lines import append_lines
from rlinf.data.records import Group, GroupHeader, Verdict
from rlinf.data.tokenizer import tokenizer_of
from rlinf.rewards.verifier import Item
from rlinf.rewards.whole import Answer, WholeReward
from rlinf.run_paths import journal_of
from rlinf.scheduling.placement import WorkerAddress


class RewardWorker:
    """Implements workers.interfaces.RewardWorker; `judge` may run many times at once in one event loop."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        self.address = address
        self.journals = config.runner.keep_groups != 0
        self.tokenizer = tokenizer_of(config)
        self.reward = WholeReward(config, config.reward.num_processes)
        self.reward.verifier.warm_up()

    async def judge(self, group: Group, dump_path: str | None = None) -> tuple[Verdict, ...]:
        """Verdicts in the order of the samples.

        With dump_path, also appends one JSON line a sample, and the group to its step's journal.
        """
        return await asyncio.to_thread(self._judge, group, dump_path)

    def keep(self, path: str, group: Group, verdicts: tuple[Verdict | None, ...]) -> None:
        write_group(Path(path), replace(group, verdicts=verdicts))

    def fetch(self, path: str, dump_path: str | None = None) -> tuple[GroupHeader, Group]:
        """The group that keep() wrote. With dump_path, samples and journal are written as when it was judged, because what was written then
        is in another folder, or was set aside when the run was resumed."""
        group = read_group(Path(path))
        if dump_path:
            self._record(Path(dump_path), group, *self._texts(group))
        return group.header(), group

    def close(self) -> None:
        self.reward.close()

    def _judge(self, group: Group, dump_path: str | None) -> tuple[Verdict, ...]:
        asked, (prompt, texts) = group.prompt, self._texts(group)
        answers = [
            Answer(Item(text, asked.solutions, asked.task, prompt), len(sample), sample.finish.cut_off, asked.metadata)
            for text, sample in zip(texts, group.samples, strict=True)
        ]
        verdicts = tuple(self.reward.judge(answers))
        if dump_path:
            self._record(Path(dump_path), replace(group, verdicts=verdicts), prompt, texts)
        return verdicts

    def _texts(self, group: Group) -> tuple[str, list[str]]:
        """The prompt and the responses as text."""
        prompt = group.prompt.text or self.tokenizer.decode(group.prompt.token_ids.tolist())
        return prompt, [self.tokenizer.decode(sample.token_ids.tolist()) for sample in group.samples]

    def _record(self, path: Path, group: Group, prompt: str, texts: list[str]) -> None:
        dump(path, group, prompt, texts, group.header().judged)
        journal = journal_of(path) if self.journals else None
        if journal is not None:
            append_lines(journal, [group_line(group)])


def dump(path: Path, group: Group, prompt: str, texts: list[str], verdicts: tuple[Verdict, ...]) -> None:
    """Append one line for each sample, in one write, since several workers may write to the same file. What the data says of the prompt
    besides (`metadata`) stands in the first of them."""
    lines, about = [], {"metadata": group.prompt.metadata} if group.prompt.metadata is not None else {}
    for sample, text, verdict in zip(group.samples, texts, verdicts, strict=True):
        lines.append(
            json.dumps(
                {
                    "group_id": group.group_id,
                    "sample_id": sample.sample_id,
                    "task": group.prompt.task,
                    "prompt": prompt,
                    "response": text,
                    "solutions": group.prompt.solutions,
                    "reward": verdict.reward,
                    "status": verdict.status.value,
                    "route": verdict.route,
                    "extracted": verdict.extracted,
                    "parts": dict(verdict.parts),
                    "reason": verdict.reason,
                    "seconds": verdict.seconds,
                    "length": len(sample),
                    "finish": sample.finish.value,
                    "versions": sample.versions,
                }
                | about,
                ensure_ascii=False,
            )
        )
        about = {}
    append_lines(path, lines)
