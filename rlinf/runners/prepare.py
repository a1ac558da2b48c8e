"""What a run reads before it asks for machines, so that what is wrong with it is said before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlinf.config.load import Resolved, value_of
from rlinf.config.model import own_functions
from rlinf.config.own_code import load_own
from rlinf.config.schema import Config
from rlinf.data import examples, prompts
from rlinf.data.examples import ExamplesReport, load_examples
from rlinf.data.prompts import DataReport, load_prompts
from rlinf.data.records import Group, Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import TextTokenizer, tokenizer_of
from rlinf.rewards.tasks import check_tasks
from rlinf.runners.resuming import SFT
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.session import check_trackers, say

Item = TypeVar("Item", Prompt, Group)


@dataclass(frozen=True)
class DataKind(Generic[Item]):
    """What the lines of the data files are to a command. held_out: how the screen calls those that are not trained on."""

    load: Callable[[Sequence[str], Config, TextTokenizer], tuple[list[Item], DataReport | ExamplesReport]]
    repeated: Callable[[Sequence[Item], Sequence[Item]], str | None]
    held_out: str
    batch_key: str


@dataclass(frozen=True)
class Prepared(Generic[Item]):
    """sampler: over `training`, with the fingerprint of its data."""

    folder: RunFolder
    tokenizer: TextTokenizer
    training: list[Item]
    held_out: list[Item]
    sampler: PromptSampler


def prepare(resolved: Resolved, command: str, kind: DataKind[Item], validates: bool = True) -> Prepared[Item]:
    """The folder of a run, its tokenizer and its data. validates: whether it reads data.val_data_paths.

    Raises UserError for what would end the run, or would end it only later.
    """
    config, held_out = resolved.config, list[Item]()
    folder, tokenizer = open_run(resolved, command)
    training, report = kind.load(config.data.train_data_paths, config, tokenizer)
    say(f"training data: {report.describe()}")
    if validates and config.data.val_data_paths:
        held_out, held_out_report = kind.load(config.data.val_data_paths, config, tokenizer)
        say(f"{kind.held_out}: {held_out_report.describe()}")
        if warning := kind.repeated(training, held_out):
            say(warning)
    batch_size, data = value_of(config, kind.batch_key), config.data
    sampler = PromptSampler(len(training), batch_size, data.shuffle, data.seed, report.fingerprint, kind.batch_key)
    return Prepared(folder, tokenizer, training, held_out, sampler)


def open_run(resolved: Resolved, command: str) -> tuple[RunFolder, TextTokenizer]:
    """What every run needs, also one that reads no data files. The user's own functions are executed once, to see whether they can be."""
    check_trackers(resolved.config.runner.logger.logger_backends)
    folder = RunFolder(resolved, command)
    tokenizer = tokenizer_of(resolved.config)
    for _, function in own_functions(resolved.config) if command != SFT else ():  # fine-tuning calls none of them
        load_own(function)
    return folder, tokenizer


def _judged(paths: Sequence[str], config: Config, tokenizer: TextTokenizer) -> tuple[list[Prompt], DataReport]:
    """Prompts whose answers somebody here can judge."""
    found, report = load_prompts(paths, config.data, tokenizer)
    check_tasks({p.task for p in found}, config.reward.own_tasks)
    return found, report


PROMPTS = DataKind(_judged, prompts.repeated, "validation data", "data.rollout_batch_size")
EXAMPLES = DataKind(load_examples, examples.repeated, "held-out data", "sft.batch_size")
