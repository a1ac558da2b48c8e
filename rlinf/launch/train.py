"""`rlinf train`: from a resolved configuration to a finished run: reads prompts, starts the workers, runs the loop, shows the result."""

from __future__ import annotations

import asyncio

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.config.load import Resolved
from rlinf.config.schema import Config
from rlinf.launch.prepare import PROMPTS, prepare
from rlinf.launch.restarts import with_restarts
from rlinf.launch.session import is_done, open_session, tell_best
from rlinf.metrics.summary import show_summary
from rlinf.run_folder.resuming import TRAIN
from rlinf.runners.learner import MegatronGroups
from rlinf.runners.reasoning import ReasoningRunner
from rlinf.runners.requests import stop_of
from rlinf.scheduling.placement import PART, Plan, build_plan
from rlinf.scheduling.turns import ENGINES_GIVE, Turn

WORKERS = {
    "actor": "rlinf.workers.actor:ActorWorker",
    "rollout": "rlinf.workers.rollout:RolloutWorker",
    "reward": "rlinf.workers.reward:RewardWorker",
    "critic": "rlinf.workers.critic:CriticWorker",
    "token_reward": "rlinf.workers.token_reward:TokenRewardWorker",
}
ENGINE_PART = "rlinf.workers.rollout_part:RolloutPart"


def train(resolved: Resolved) -> int:
    """Run to the end and return 0; after a hang, restart as runner.on_hang says. Whatever was started is ended, however this returns."""
    return with_restarts(train_once, resolved)


def train_once(resolved: Resolved) -> int:
    config, run = resolved.config, prepare(resolved, TRAIN, PROMPTS)
    if is_done(run.folder, run.sampler):
        return 0
    with open_session(resolved, run.folder, run.tokenizer, run.sampler.fingerprint) as session:
        plan = build_plan(config, session.nodes)
        groups = launch_workers(session.cluster, plan, config)
        megatron = MegatronGroups(**{name: groups[name] for name in config.megatron_roles})
        data = run.training, run.held_out, run.sampler, stop_of(config.algorithm, run.tokenizer)
        runner = ReasoningRunner(config, run.folder, session.cluster, megatron, groups["rollout"], groups["reward"], *data)
        session.complete(runner, list(groups.values()))
    if len(runner.scores) > 1:
        first, last = min(runner.scores), max(runner.scores)
        show_summary(runner.scores[first].as_scores(), runner.scores[last].as_scores(), config.runner.output_dir)
    tell_best(run.folder)
    return 0


def launch_workers(cluster: Cluster, plan: Plan, config: Config) -> dict[str, WorkerGroup]:
    """All worker groups of a run, by component.

    They start at the same time, except where engines share GPUs with them: an engine takes a share of the memory that is free when it
    starts. So it starts after the others are up and have freed the GPU; then it sleeps until it gets the first weights, because an actor
    that loads a checkpoint needs the GPU before that.
    """
    first = config.megatron_roles
    turns = cluster.device == "cuda" and config.cluster.backend == "ray" and any(plan.shares_device(name, "rollout") for name in first)
    groups = {name: cluster.launch(plan, name, WORKERS[name], config) for name in first}
    for name in first if turns else ():
        asyncio.run(cluster.guard(groups[name].call_all("hand_over")))
    groups |= launch_generation(cluster, plan, config)
    if turns and config.rollout.offload:
        asyncio.run(cluster.guard(groups["rollout"].call_all("sleep", ENGINES_GIVE[Turn.TRAIN])))
    return groups


def launch_generation(cluster: Cluster, plan: Plan, config: Config) -> dict[str, WorkerGroup]:
    """Rollout workers, of which a few may die (rollout.max_engine_restarts), and reward workers."""
    launch_parts(cluster, plan, config)
    groups = {name: cluster.launch(plan, name, WORKERS[name], config) for name in ("rollout", "reward")}
    groups["rollout"].deaths_allowed = config.engine_restarts
    return groups


def launch_parts(cluster: Cluster, plan: Plan, config: Config) -> None:
    """Workers on the further nodes of engines that span several nodes. They keep their part of the engine up and are never called."""
    if plan.of(PART):
        cluster.launch(plan, PART, ENGINE_PART, config)
