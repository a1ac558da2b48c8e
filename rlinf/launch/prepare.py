"""Opens a run's folder and reads tokenizer and data before anything is started, so that mistakes in them are reported first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Generic, TypeVar

from rlinf.config.load import Resolved, value_of
from rlinf.config.model import own_functions
from rlinf.config.own_code import check_own
from rlinf.config.schema import Config
from rlinf.data import examples, prompts
from rlinf.data.examples import ExamplesReport, load_examples
from rlinf.data.prompts import DataReport, load_prompts, problems_fingerprint
from rlinf.data.records import Group, Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import TextTokenizer, tokenizer_of
from rlinf.launch.session import check_trackers, say
from rlinf.rewards.tasks import check_tasks, judge_identity
from rlinf.run_folder.folder import RunFolder
from rlinf.run_folder.resuming import SFT

Item = TypeVar("Item", Prompt, Group)


@dataclass(frozen=True)
class DataKind(Generic[Item]):
    """How a command reads data files.

    load: (paths, configuration, tokenizer) -> (items, report). repeated: a warning when held-out items are also trained on.
    held_out: what messages call the held-out items. batch_key: the key with the number of items in a batch.
    measured_on: (held-out items, their report, configuration) -> what stands for them and their measuring (RunFolder.measured_on).
    """

    load: Callable[[Sequence[str], Config, TextTokenizer], tuple[list[Item], DataReport | ExamplesReport]]
    repeated: Callable[[Sequence[Item], Sequence[Item]], str | None]
    held_out: str
    batch_key: str
    measured_on: Callable[[Sequence[Item], DataReport | ExamplesReport, Config], str]


@dataclass(frozen=True)
class Prepared(Generic[Item]):
    """What prepare() opened and read. sampler: over `training`; it knows the fingerprint of the data."""

    folder: RunFolder
    tokenizer: TextTokenizer
    training: list[Item]
    held_out: list[Item]
    sampler: PromptSampler


def prepare(resolved: Resolved, command: str, kind: DataKind[Item], validates: bool = True) -> Prepared[Item]:
    """Open the folder of a run and read its tokenizer and data. validates: whether data.val_data_paths are read.

    Raises UserError for anything in them with which the run could not reach its end.
    """
    config, held_out = resolved.config, list[Item]()
    folder, tokenizer = open_run(resolved, command)
    training, report = kind.load(config.data.train_data_paths, config, tokenizer)
    say(f"training data: {report.describe()}")
    if validates and config.data.val_data_paths:
        held_out, held_out_report = kind.load(config.data.val_data_paths, config, tokenizer)
        say(f"{kind.held_out}: {held_out_report.describe()}")
        folder.measured_on = kind.measured_on(held_out, held_out_report, config)
        if warning := kind.repeated(training, held_out):
            say(warning)
    batch_size, data = value_of(config, kind.batch_key), config.data
    sampler = PromptSampler(len(training), batch_size, data.shuffle, data.seed, report.fingerprint, kind.batch_key)
    return Prepared(folder, tokenizer, training, held_out, sampler)


def _scored_on(held_out: Sequence[Prompt], report: DataReport | ExamplesReport, config: Config) -> str:
    """The held-out problems with their solutions, how they are sampled, and who judges the answers."""
    longest = config.validation.max_new_tokens or config.algorithm.sampling_params.max_new_tokens
    sampling = asdict(replace(config.validation, max_new_tokens=longest)) | {"stop": config.algorithm.sampling_params.stop}
    return json.dumps({"problems": problems_fingerprint(held_out), "sampling": sampling, "judge": judge_identity(config.reward)})


def open_run(resolved: Resolved, command: str) -> tuple[RunFolder, TextTokenizer]:
    """Run folder and tokenizer, all that a run without data files needs. Loads the user's own functions once, to see whether it works."""
    check_trackers(resolved.config.runner.logger.logger_backends)
    folder = RunFolder(resolved, command)
    tokenizer = tokenizer_of(resolved.config)
    if command != SFT:  # fine-tuning calls none of them
        for key, function in own_functions(resolved.config):
            check_own(key, function)
    return folder, tokenizer


def _load_judged(paths: Sequence[str], config: Config, tokenizer: TextTokenizer) -> tuple[list[Prompt], DataReport]:
    """Prompts; raises UserError when one has a task for which there is no judge."""
    found, report = load_prompts(paths, config.data, tokenizer)
    check_tasks({p.task for p in found}, config.reward.own_tasks)
    return found, report


PROMPTS = DataKind(_load_judged, prompts.repeated, "validation data", "data.rollout_batch_size", _scored_on)
EXAMPLES = DataKind(load_examples, examples.repeated, "held-out data", "sft.batch_size", lambda _, report, __: report.fingerprint)
