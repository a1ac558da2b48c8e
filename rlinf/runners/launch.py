"""From a resolved configuration to a finished run: prompts, machines, workers, the loop, the table at the end."""

from __future__ import annotations

import asyncio

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.load import Resolved
from rlinf.config.model import own_functions
from rlinf.config.own_code import load_own
from rlinf.config.schema import Config
from rlinf.data.prompts import load_prompts, repeated
from rlinf.data.records import Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import load_tokenizer
from rlinf.metrics.summary import show_summary
from rlinf.rewards.tasks import check_tasks
from rlinf.runners.reasoning import ReasoningRunner
from rlinf.runners.requests import stop_of
from rlinf.runners.restarts import with_restarts
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.session import check_trackers, is_done, open_session, say
from rlinf.scheduling.placement import PART, Plan, build_plan
from rlinf.scheduling.turns import ENGINES_GIVE, Turn

WORKERS = {
    "actor": "rlinf.workers.train:TrainWorker",
    "rollout": "rlinf.workers.rollout:RolloutWorker",
    "reward": "rlinf.workers.reward:RewardWorker",
    "critic": "rlinf.workers.critic:CriticWorker",
    "token_reward": "rlinf.workers.token_reward:TokenRewardWorker",
}
ENGINE_PART = "rlinf.workers.rollout_part:RolloutPart"


def train(resolved: Resolved) -> int:
    """Run to the end, behind hangs too; 0 when it finished. Everything that was started is ended, however this returns."""
    return with_restarts(train_once, resolved)


def train_once(resolved: Resolved) -> int:
    config = resolved.config
    check_trackers(config.runner.logger.logger_backends)
    folder = RunFolder(resolved)
    tokenizer = load_tokenizer(config.rollout.model_dir, config.rollout.trust_remote_code, config.data.chat_template_variables)
    prompts, report = load_prompts(config.data.train_data_paths, config.data, tokenizer)
    say(f"training data: {report.describe()}")
    val_prompts: list[Prompt] = []
    if config.data.val_data_paths:
        val_prompts, val_report = load_prompts(config.data.val_data_paths, config.data, tokenizer)
        say(f"validation data: {val_report.describe()}")
        if warning := repeated(prompts, val_prompts):
            say(warning)
    check_tasks({p.task for p in (*prompts, *val_prompts)}, config.reward.own_tasks)
    for _, function in own_functions(config):
        load_own(function)
    sampler = PromptSampler(len(prompts), config.data.rollout_batch_size, config.data.shuffle, config.data.seed, report.fingerprint)
    if is_done(folder, sampler):
        return 0
    with open_session(resolved, folder, tokenizer, report.fingerprint) as session:
        plan = build_plan(config, session.nodes)
        groups = launch_workers(session.cluster, plan, config)
        stop = stop_of(config.algorithm, tokenizer)
        runner = ReasoningRunner(
            config, folder, session.cluster, prompts=prompts, val_prompts=val_prompts, sampler=sampler, stop=stop, **groups
        )
        session.complete(runner, list(groups.values()))
    if len(runner.scores) > 1:
        first, last = min(runner.scores), max(runner.scores)
        show_summary(runner.scores[first].as_scores(), runner.scores[last].as_scores(), config.runner.output_dir)
    return 0


def launch_workers(cluster: Cluster, plan: Plan, config: Config) -> dict[str, WorkerGroup]:
    """All of a run. They start at the same time, except on GPUs that engines share: an engine takes its share of what is free when it
    starts, so it waits until the others are there and have left; and it sleeps until the first weights, since an actor that goes on
    from a checkpoint comes back before them."""
    first = config.megatron_roles  # which leave a device to its engine
    turns = cluster.device == "cuda" and config.cluster.backend == "ray" and any(plan.shares_device(name, "rollout") for name in first)
    groups = {name: cluster.launch(plan, name, WORKERS[name], config) for name in first}
    for name in first if turns else ():
        asyncio.run(cluster.guard(groups[name].call_all("hand_over")))
    groups |= launch_generation(cluster, plan, config)
    if turns and config.rollout.offload:
        asyncio.run(cluster.guard(groups["rollout"].call_all("sleep", ENGINES_GIVE[Turn.TRAIN])))
    return groups


def launch_generation(cluster: Cluster, plan: Plan, config: Config) -> dict[str, WorkerGroup]:
    """Engines, some of whose deaths the run survives, and those who judge."""
    launch_parts(cluster, plan, config)
    groups = {name: cluster.launch(plan, name, WORKERS[name], config) for name in ("rollout", "reward")}
    groups["rollout"].deaths_allowed = config.engine_restarts
    return groups


def launch_parts(cluster: Cluster, plan: Plan, config: Config) -> None:
    """What stands on the other nodes of engines that span several; nobody calls it."""
    if plan.of(PART):
        cluster.launch(plan, PART, ENGINE_PART, config)
