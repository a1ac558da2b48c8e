"""algorithm.schedule: wallclock. Group by group, as engines have room and the bound on staleness allows."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlinf.algorithms.filters import has_signal
from rlinf.cluster.group import Ref
from rlinf.config.schema import Config
from rlinf.data.records import GroupHeader, Verdict
from rlinf.data.sampler import PromptSampler
from rlinf.runners.requests import GroupRequest
from rlinf.runners.rollouts import Rollouts, Scored, mean_length
from rlinf.runners.schedule import GroupsOnDisk, Requests
from rlinf.runners.selection import StepBatch, no_signal
from rlinf.runners.step_metrics import dynamic_sampling_metrics
from rlinf.scheduling.length_bias import LengthBias
from rlinf.scheduling.staleness import Ledger


class Wallclock:
    """Fast, but not reproducible: groups are begun as soon as staleness allows, and trained on in the order in which they finish.

    Engines take new weights in the middle of groups; every token keeps the version that decoded it. With rollout.partial the engines pause
    while the actor trains, as they must on shared devices, and unfinished groups are carried over to the next step with their tokens.
    """

    def __init__(
        self, config: Config, sampler: PromptSampler, rollouts: Rollouts, on_disk: GroupsOnDisk, requests: Requests, total_steps: int
    ) -> None:
        self.algorithm, self.rollout, self.max_epochs = config.algorithm, config.rollout, config.runner.max_epochs
        self.sampler, self.rollouts, self.on_disk, self.requests, self.total_steps = sampler, rollouts, on_disk, requests, total_steps
        self.ledger = Ledger(sampler.batch_size, config.algorithm.max_staleness)
        self.bias = LengthBias((config.algorithm.max_staleness + 1) * sampler.batch_size)
        self.wanted: dict[str, tuple[int, int]] = {}  # group that was begun and not yet taken -> (prompt, the step that it was begun for)
        self.tasks: dict[str, asyncio.Task[Scored]] = {}  # those of `wanted` that are being generated
        self.done: dict[str, Scored] = {}  # those of `wanted` that are complete and judged
        self.taken: tuple[int, Counter[str]] = 0, Counter()  # (step, how often it has taken each prompt)
        self.dropped: list[GroupHeader] = []  # groups without signal since the last batch
        self.groups_begun = 0  # since the start of the run, including those that were dropped later

    @property
    def exhausted(self) -> bool:
        waiting = len(self.ledger.groups) + len(self.dropped)  # as at the end of take(): a checkpoint, which collects, changes no answer
        return self.left + waiting < self.sampler.batch_size

    @property
    def left(self) -> int:
        """How many prompts of the runner.max_epochs epochs were not begun yet."""
        return self.sampler.n * self.max_epochs - self.sampler.handed_out

    async def take(self, step: int) -> StepBatch:
        version = step - 1
        self.rollouts.resume()
        self.begin(version)
        while (names := self.ledger.take(version)) is None:
            await asyncio.wait(self.tasks.values(), return_when=asyncio.FIRST_COMPLETED)
            self.collect()
            self.begin(version)
        scored = [self.done.pop(name) for name in names]
        for name in names:
            del self.wanted[name]
        metrics = {
            "rollout/carried_over": float(len(self.tasks)),
            "rollout/length_bias": self.bias.train([mean_length(header) for header, _ in scored], self.rollouts.engine_clock),
        }
        generated, self.dropped = [*(header for header, _ in scored), *self.dropped], []
        if self.algorithm.dynamic_sampling:
            metrics |= dynamic_sampling_metrics(len(generated), len(generated), len(generated) - len(scored))
        return StepBatch(scored, generated, metrics)

    def begin(self, version: int) -> None:
        """Begin all groups that may be begun now, first those that the process before a resumption had begun."""
        for name in [name for name in self.wanted if name not in self.tasks and name not in self.done]:
            prompt, step = self.wanted[name]
            (wanted,) = self.requests(step, [prompt], Counter())
            self._start(replace(wanted, name=name))
        for prompt in self.sampler.next_batch(self.room(version)):
            step = self.groups_begun // self.sampler.batch_size + 1
            self.taken = self.taken if self.taken[0] == step else (step, Counter())
            (wanted,) = self.requests(step, [prompt], self.taken[1])
            self.groups_begun += 1
            self.wanted[wanted.name] = prompt, step
            self.ledger.begin(wanted.name, version)
            self.bias.begin(wanted.name, self.rollouts.engine_clock)
            self._start(wanted)

    def room(self, version: int) -> int:
        """How many more groups may be begun now."""
        size, waiting = self.sampler.batch_size, len(self.ledger.groups)
        bounds = [
            self.ledger.room(version),  # by staleness
            self.total_steps * size - self.ledger.begun_and_kept,  # by the end of the run
            max(self.left, size - waiting),  # by the data; a step short of groups with signal may take prompts of a further epoch
        ]
        if self.rollout.over_provisioning:
            bounds.append(int(self.rollout.over_provisioning * size) - waiting)
        return max(0, min(bounds))

    def _start(self, group: GroupRequest) -> None:
        self.tasks[group.name] = asyncio.ensure_future(self.rollouts.generate_group(group, pausable=self.rollout.partial))

    def collect(self) -> None:
        """Take the results of finished tasks; with dynamic sampling a group without signal is dropped and makes room for another."""
        for name in [name for name, task in self.tasks.items() if task.done()]:
            header, tokens = self.tasks.pop(name).result()
            if self.algorithm.dynamic_sampling and not has_signal(header.right):
                self.dropped.append(header)
                self.ledger.drop(name)
                self.bias.drop(name)
                del self.wanted[name]
                if len(self.dropped) > self.algorithm.dynamic_sampling_max_batches * self.sampler.batch_size:
                    raise no_signal(self.algorithm, self.sampler.batch_size, self.sampler.batch_size, len(self.done), self.dropped)
            else:
                self.done[name] = header, tokens
                self.ledger.finish(name)
                self.bias.finish(name, mean_length(header), self.rollouts.engine_clock)

    async def before_training(self) -> None:
        if self.rollout.partial:
            await self.rollouts.pause()
            self.collect()

    async def before_sync(self) -> None: ...

    async def save(self, folder: Path) -> dict[str, Any]:
        """Groups that are done or paused are kept with their tokens; those that an engine is generating now are begun again after a
        resumption."""
        self.collect()
        # looked up before anything is awaited, because groups finish while others are written
        held: dict[str, tuple[Ref, tuple[Verdict | None, ...]]] = {name: (tokens, ()) for name, tokens in self.rollouts.unfinished.items()}
        held |= {name: (tokens, header.verdicts) for name, (header, tokens) in self.done.items()}
        files = {name: f"{i:05d}" for i, name in enumerate(n for n in self.wanted if n in held)}
        for name, file in files.items():
            await self.on_disk.put(folder, file, *held[name])
        return {
            "ledger": self.ledger.state(),
            "wanted": [[name, prompt, step] for name, (prompt, step) in self.wanted.items()],
            "files": files,
            "begun": self.groups_begun,
            "met": [self.taken[0], dict(self.taken[1])],
            "bias": self.bias.state(self.rollouts.engine_clock),
        }

    async def restore(self, folder: Path, state: dict[str, Any], step: int) -> None:
        if not state.get("wanted"):
            size, named = self.sampler.batch_size, state.get("met", [0])[0]  # no group is named as one before the checkpoint
            self.ledger.begun_and_kept, self.groups_begun = step * size, max(step, named) * size
            return
        self.ledger.restore(state["ledger"])
        self.wanted = {name: (prompt, step) for name, prompt, step in state["wanted"]}
        self.groups_begun, self.taken = state["begun"], (state["met"][0], Counter(state["met"][1]))
        for name, file in state["files"].items():
            done = self.ledger.groups[name].done
            header, tokens = await self.on_disk.get(folder, file, self.wanted[name][1] if done else None)
            if done:
                self.done[name] = header, tokens
            else:
                self.rollouts.unfinished[name] = tokens
        if "bias" in state:  # not in an older checkpoint
            self.bias.restore(state["bias"], self.rollouts.engine_clock)
            return
        for name in self.wanted:
            self.bias.begin(name, self.rollouts.engine_clock)
            if name in self.done:
                self.bias.finish(name, mean_length(self.done[name][0]), self.rollouts.engine_clock)
