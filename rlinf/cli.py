"""The `rlinf` command: parses, calls, prints. Each command imports what it needs when it runs, so that `rlinf --help` is quick.

Exit codes: 0 good, 2 the user's mistake (one message), 1 ours, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf.errors import RunFailed, UserError

if TYPE_CHECKING:
    from rlinf.config.load import Resolved
    from rlinf.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors that are neither the user's nor the run's propagate with their traceback."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return args.run(args)
    except UserError as e:
        sys.stderr.write(f"rlinf: {e}\n")
        return 2
    except RunFailed as e:
        sys.stderr.write(f"rlinf: {e}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("rlinf: interrupted\n")
        return 130


def train(args: argparse.Namespace) -> int:
    from rlinf.config.load import load
    from rlinf.config.validate import validate
    from rlinf.scheduling.placement import build_plan, describe, nodes_of

    resolved = load(args.config, args.overrides)
    config = resolved.config
    validate(config, resolved.provenance)
    warnings = _check_model(config, args.dry_run)
    plan = build_plan(config, nodes_of(config.cluster))
    if args.dry_run:
        batch = config.data.rollout_batch_size * config.algorithm.group_size
        _say(f"config: {resolved.source}")
        _say(f"step: {config.data.rollout_batch_size} prompts x {config.algorithm.group_size} responses = {batch} samples, "
             f"{config.algorithm.n_minibatches} optimizer step(s) of {batch // config.algorithm.n_minibatches}")  # fmt: skip
        return _end_dry_run(describe(plan, config), warnings)
    from rlinf.report.page import write_report
    from rlinf.runners.run_folder import run_path

    code = _launch(args, resolved)
    sys.stderr.write(f"report: {write_report(run_path(config.runner))}\n")
    return code


def _launch(args: argparse.Namespace, resolved: Resolved) -> int:
    """The whole run, or the half of it that was asked for."""
    if args.debug_rollout_only:
        from rlinf.runners.launch_debug import rollout_only

        return rollout_only(resolved)
    if args.debug_train_only:
        from rlinf.runners.launch_debug import train_only

        return train_only(resolved, args.debug_train_only)
    from rlinf.runners.launch import train as whole

    return whole(resolved)


def replay(args: argparse.Namespace) -> int:
    from rlinf.report.replay import replay as run_again

    return run_again(args.run_dir, args.step, args.overrides, args.rollout, args.from_start, args.tolerance)


def report(args: argparse.Namespace) -> int:
    from rlinf.report.page import write_report

    _say(str(write_report(args.run_dir, args.output)))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from rlinf.evaluation.evaluate import main as evaluation

    return evaluation(args.words)


def sft(args: argparse.Namespace) -> int:
    from rlinf.config.load import load
    from rlinf.config.validate import validate_sft
    from rlinf.scheduling.placement import build_sft_plan, describe, nodes_of

    resolved = load(args.config, args.overrides)
    config = resolved.config
    validate_sft(config, resolved.provenance)
    warnings = _check_model(config, args.dry_run)
    plan = build_sft_plan(config, nodes_of(config.cluster))
    if args.dry_run:
        _say(f"config: {resolved.source}")
        _say(f"step: {config.sft.batch_size} examples, 1 optimizer step")
        return _end_dry_run(describe(plan, config), warnings)
    from rlinf.runners.launch_sft import finetune

    return finetune(resolved)


def plan(args: argparse.Namespace) -> int:
    from rlinf.checks.plan import main as plan
    from rlinf.config.load import load

    return plan(load(args.config, args.overrides), args.device, args.mean_response, args.json)


def watch(args: argparse.Namespace) -> int:
    from rlinf.report.watch import watch as show

    return show(args.run_dir, args.once)


def doctor(args: argparse.Namespace) -> int:
    from rlinf.checks.doctor import main as examine
    from rlinf.config.load import load

    return examine(load(args.config, args.overrides) if args.config else None, args.json)


def config_show(args: argparse.Namespace) -> int:
    from rlinf.config.load import load, to_yaml

    sys.stdout.write(to_yaml(load(args.config, args.overrides)))
    return 0


def config_explain(args: argparse.Namespace) -> int:
    from rlinf.config.explain import explain
    from rlinf.config.load import load

    _say(explain(load(args.config, args.overrides) if args.config else None, args.key))
    return 0


def data_generate(args: argparse.Namespace) -> int:
    if args.task == "arithmetic":
        from rlinf.data.arithmetic import generate

        _report(generate(args.out_dir, args.train, args.val, args.seed))
    else:
        from rlinf.rewards.reasoning_gym import generate_files

        _report(generate_files(args.out_dir, args.task.split(","), args.train, args.val, args.seed))
    return 0


def data_convert(args: argparse.Namespace) -> int:
    from rlinf.evaluation.convert import convert

    _report(convert(args.benchmark, args.source, args.out, args.seed))
    return 0


def data_check(args: argparse.Namespace) -> int:
    from rlinf.checks.data_check import main as check

    return check(args.file, args.json)


def check_layout(args: argparse.Namespace) -> int:
    from rlinf.checks.layout import main as check

    return check(args.quick, args.json)


def check_resume(args: argparse.Namespace) -> int:
    from rlinf.checks.resume import main as check

    return check(args.quick, args.json, args.seed)


def export(args: argparse.Namespace) -> int:
    from rlinf.runners.export import export as write

    _report(write(args.step_dir, args.out, args.dtype, args.model_dir))
    return 0


def check_sync(args: argparse.Namespace) -> int:
    from rlinf.checks.sync import main as check

    return check(args.quick, args.json)


def compare(args: argparse.Namespace) -> int:
    from rlinf.report.compare import main as compare_runs

    return compare_runs(args.run_a, args.run_b, args.tolerance, args.json)


def verify(args: argparse.Namespace) -> int:
    from rlinf.rewards.verify_file import verify_file

    _report(verify_file(args.input, args.output, args.processes))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlinf", description="Reinforcement learning for reasoning models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("train", help="train a model")
    _config_arguments(p)
    p.add_argument("--dry-run", action="store_true", help="resolve, validate and print the placement; start nothing")
    half = p.add_mutually_exclusive_group()
    half.add_argument("--debug-rollout-only", action="store_true", help="generate and judge the steps with the start model; no actor")
    half.add_argument("--debug-train-only", metavar="RUN_DIR", type=Path, help="train on the journalled groups of another run; no engines")
    p.set_defaults(run=train)

    p = commands.add_parser("eval", help="score models on benchmarks")
    p.add_argument("words", metavar="CONFIG|HF_DIR|key=value", nargs="+", help="a configuration, model folders or checkpoints, settings")
    p.set_defaults(run=evaluate)

    p = commands.add_parser("sft", help="fine-tune a model on prompts and responses")
    _config_arguments(p)
    p.add_argument("--dry-run", action="store_true", help="resolve, validate and print the placement; start nothing")
    p.set_defaults(run=sft)

    p = commands.add_parser("report", help="one offline page of a run: curves, findings, samples, configuration")
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    p.add_argument("--output", metavar="FILE", type=Path, help="where to write it (default: RUN_DIR/report.html)")
    p.set_defaults(run=report)

    p = commands.add_parser("replay", help="a journalled step again from disk, its metrics beside the recorded ones")
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    p.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="another layout, say: cluster.num_gpus_per_node=2")
    p.add_argument("--step", metavar="N", type=int, required=True)
    p.add_argument("--rollout", action="store_true", help="generate and judge its samples again too")
    p.add_argument("--from-start", action="store_true", help="from the start model instead of the checkpoint before the step")
    p.add_argument("--tolerance", type=float, help="relative difference that counts as rounding (default 1e-5 in fp32, 0.02 in 16 bit)")
    p.set_defaults(run=replay)

    p = commands.add_parser("plan", help="placement, memory of every rank, expected time of a step; what to change when it does not fit")
    _config_arguments(p)
    p.add_argument("--device", metavar="NAME", help="h100 (default), h200, h800, h20, a100, a100-40g, l40s, rtx4090 or cpu")
    p.add_argument("--mean-response", type=int, metavar="TOKENS", help="mean length of a response, for the time of a step")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")
    p.set_defaults(run=plan)

    p = commands.add_parser("watch", help="what a run is doing now")
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    p.add_argument("--once", action="store_true", help="show it once and return")
    p.set_defaults(run=watch)

    p = commands.add_parser("doctor", help="is this machine (and the cluster that is up on it) ready; with CONFIG, for that run")
    _config_arguments(p, optional=True)
    p.add_argument("--json", action="store_true", help="print the findings as JSON")
    p.set_defaults(run=doctor)

    sub = commands.add_parser("config", help="show a configuration, explain a key").add_subparsers(required=True, metavar="COMMAND")
    p = sub.add_parser("show", help="the resolved configuration, each value with who set it")
    _config_arguments(p)
    p.set_defaults(run=config_show)
    p = sub.add_parser("explain", help="meaning, type, default and choices of a key or a section; with CONFIG its value and who set it")
    p.add_argument("key", metavar="KEY")
    _config_arguments(p, optional=True)
    p.set_defaults(run=config_explain)

    sub = commands.add_parser("data", help="generate, convert or check data files").add_subparsers(required=True, metavar="COMMAND")
    p = sub.add_parser("generate", help="problems for training: train.jsonl and a held-out val.jsonl")
    p.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    p.add_argument("--task", default="arithmetic", help="`arithmetic` (default) or `rg/<family>` of reasoning-gym, several with commas")
    p.add_argument("--train", type=int, default=1300, help="training problems of each task (default 1300)")
    p.add_argument("--val", type=int, default=256, help="held-out problems of each task (default 256)")
    p.add_argument("--seed", type=int, default=1234)
    p.set_defaults(run=data_generate)
    p = sub.add_parser("convert", help="a benchmark's public file to the AReaL-boba format")
    p.add_argument("benchmark", metavar="BENCHMARK", help="aime24, aime25, gpqa_diamond, math500 or gsm8k")
    p.add_argument("source", metavar="FILE", type=Path, help=".jsonl, .json, .csv or .parquet")
    p.add_argument("out", metavar="OUT", type=Path)
    p.add_argument("--seed", type=int, default=1234, help="of the order of GPQA's options")
    p.set_defaults(run=data_convert)
    p = sub.add_parser("check", help="check a JSONL file in the AReaL-boba format")
    p.add_argument("file", metavar="FILE", type=Path)
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    p.set_defaults(run=data_check)

    sub = commands.add_parser("check", help="proofs of this platform, on this machine").add_subparsers(required=True, metavar="COMMAND")
    p = sub.add_parser("layout", help="the same step in every parallel layout, packing and order, against plain transformers")
    p.add_argument("--quick", action="store_true", help="every layout once")
    p.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    p.set_defaults(run=check_layout)
    p = sub.add_parser("sync", help="the actor's weights in the engines, from every layout by every transport")
    p.add_argument("--quick", action="store_true", help="every layout once")
    p.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    p.set_defaults(run=check_sync)

    p = sub.add_parser("resume", help="kill tiny runs at many instants, go on, and compare with runs that nobody killed")
    p.add_argument("--quick", action="store_true", help="five kills, all in one process")
    p.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    p.add_argument("--seed", type=int, default=0, help="of the instants (default 0)")
    p.set_defaults(run=check_resume)

    p = commands.add_parser("export", help="a checkpoint's weights as a Hugging Face model folder")
    p.add_argument("step_dir", metavar="STEP_DIR", type=Path, help="checkpoints/step_* of a run")
    p.add_argument("out", metavar="OUT_HF_DIR", type=Path, help="a folder that does not exist yet")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: that of hf/, or else of the model")
    p.add_argument("--model-dir", metavar="HF_DIR", type=Path, help="configuration and tokenizer; default: hf/, or else the run's rollout.model_dir")
    p.set_defaults(run=export)


    p = commands.add_parser("compare", help="where two runs part, and why")
    p.add_argument("run_a", metavar="RUN_A", type=Path)
    p.add_argument("run_b", metavar="RUN_B", type=Path)
    p.add_argument("--tolerance", type=float, default=1e-6, help="relative difference of a metric that counts as rounding (default 1e-6)")
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    p.set_defaults(run=compare)

    p = commands.add_parser("verify", help="grade a JSONL file of responses")
    p.add_argument("input", metavar="IN", type=Path)
    p.add_argument("output", metavar="OUT", type=Path)
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="verifier processes (default: one a core)")
    p.set_defaults(run=verify)
    return parser


def _config_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?" if optional else None, help="a YAML file, or the stem of one in examples/math/config"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="set a key, e.g. runner.max_steps=10")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that stand behind an option: `train CONFIG --dry-run key=value`
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _check_model(config: Config, dry_run: bool) -> list[str]:
    """Read the model's shape and look for the files; what is missing is an error, or on a dry run a warning."""
    from rlinf.config.model import load_model_config, missing_paths, planned_model_config, validate_model, validate_scorer
    from rlinf.weights.architecture import read_architecture

    def read(model_dir: str, key: str) -> tuple[dict[str, Any] | None, list[str]]:
        return planned_model_config(model_dir, key) if dry_run else (load_model_config(model_dir, key), [])

    hf, warnings = read(config.rollout.model_dir, "rollout.model_dir")
    if hf:
        read_architecture(hf)
        validate_model(config, hf)
    for role in ("critic", "token_reward"):
        folder = getattr(config, role).model_dir
        other, more = read(folder, f"{role}.model_dir") if folder and config.has(role) else (hf, [])
        warnings += more
        if hf and other and config.has(role):
            read_architecture(other)
            validate_scorer(config, role, other, hf)
    absent = missing_paths(config)
    if absent and not dry_run:
        raise UserError("\n  ".join(["files that the run needs are missing:", *absent]))
    return [*warnings, *absent]


def _end_dry_run(placement: str, warnings: Sequence[str]) -> int:
    _say(placement)
    for warning in warnings:
        _say(f"warning: {warning}")
    _say("dry run: the configuration is valid; nothing was started")
    return 0


def _report(result: dict[str, Any]) -> None:
    for name, value in result.items():
        _say(f"{name}: {value if isinstance(value, (str, int, float, Path)) else json.dumps(value, default=str)}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
