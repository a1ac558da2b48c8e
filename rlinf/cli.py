"""The `rlinf` command line: a function for each command, which parses, calls and prints; the work is done elsewhere.

Each command imports what it needs when it runs, so that `rlinf --help` is quick.
Exit codes: 0 success, 1 the run failed, 2 the user's mistake (one message), 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf.config.arguments import tolerance, whole
from rlinf.config.benchmarks import INSTRUCTION
from rlinf.errors import RunFailed, UserError
from rlinf.hardware import cores

if TYPE_CHECKING:
    from rlinf.config.load import Resolved
    from rlinf.config.schema import Config

Run = Callable[[argparse.Namespace], int]
Argument = Callable[[Any], Any]  # a function that adds one argument (or several) to a parser

GROUPS = {
    "config": "show a configuration, explain a key",
    "data": "generate, import, convert or check data files",
    "check": "proofs of this platform, on this machine",
}
PATH_ERRORS = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG)
COMMANDS: list[tuple[str, str, tuple[Argument, ...], Run]] = []  # name, help, arguments, function; in the order of --help


def arg(*names: str, **options: Any) -> Argument:
    """An argument of a command, described as for argparse's add_argument()."""
    return lambda parser: parser.add_argument(*names, **options)


def one_of(*arguments: Argument) -> Argument:
    """Arguments that exclude each other."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for argument in arguments:
            argument(group)

    return add


def command(name: str, help: str, *arguments: Argument) -> Callable[[Run], Run]:
    """Register the decorated function as the command `name`: one word (`report`), or a group and a word (`data check`)."""

    def declare(run: Run) -> Run:
        COMMANDS.append((name, help, arguments, run))
        return run

    return declare


def config_argument(parser: argparse.ArgumentParser, **how: Any) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the stem of one in examples/math/config", **how)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="set a key, e.g. runner.max_steps=10")


def user_path(text: str) -> Path:
    """A path in which a leading `~` is the home folder, also where quotes kept the shell from expanding it."""
    return Path(os.path.expanduser(text))


def optional_config(parser: argparse.ArgumentParser) -> None:
    config_argument(parser, nargs="?")


RUN_DIR = arg("run_dir", metavar="RUN_DIR", type=user_path)
DRY_RUN = arg("--dry-run", action="store_true", help="resolve, validate and print the placement; start nothing")
AS_JSON = arg("--json", action="store_true", help="print the result as JSON")
JSON_FILE = arg("--json", metavar="FILE", type=user_path, help="write the figures")
QUICK = arg("--quick", action="store_true", help="every layout once")
SEED = whole(0, 2**63 - 1)  # what numpy's bit generators tell apart
REWARD_CONFIG = arg("--config", metavar="CONFIG", help="reward as its section `reward` says: own tasks, own parts, answer format, time-out")
DATA_CONFIG = arg("--config", metavar="CONFIG", help="read and judge as its sections `data` and `reward` say: fields, tasks, own tasks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors that are neither the user's nor the run's propagate with their traceback."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return args.run(args)
    except UserError as e:
        sys.stderr.write(f"rlinf: {e}\n")
        return 2
    except OSError as e:
        denied = e.errno == errno.EACCES
        in_a_run = args.run in (train, sft)  # a path that is missing there is hardly one that the user gave
        if e.filename is None or e.errno not in PATH_ERRORS or (in_a_run and not denied):
            raise
        what = "permission denied; let this user read and write it, or" if denied else f"{e.strerror};"
        sys.stderr.write(f"rlinf: {e.filename}: {what} give another path\n")
        return 2
    except RunFailed as e:
        sys.stderr.write(f"rlinf: {e}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("rlinf: interrupted\n")
        return 130


@command(
    "train",
    "train a model",
    config_argument,
    DRY_RUN,
    one_of(
        arg("--debug-rollout-only", action="store_true", help="generate and judge the steps with the start model; no actor"),
        arg("--debug-train-only", metavar="RUN_DIR", type=user_path, help="train on the journalled groups of another run; no engines"),
    ),
)
def train(args: argparse.Namespace) -> int:
    from rlinf.checks.preflight import check_engine, check_files, check_models, describe_step
    from rlinf.config.load import load
    from rlinf.config.validate import validate
    from rlinf.scheduling.placement import build_plan, describe, nodes_of

    resolved = load(args.config, args.overrides)
    config = resolved.config
    validate(config, resolved.provenance)
    _, warnings = check_models(config, args.dry_run)
    plan = build_plan(config, nodes_of(config.cluster))
    warnings += check_files(config, args.dry_run)
    if not args.debug_train_only:
        warnings += check_engine(config, args.dry_run)
    if args.dry_run:
        _print(f"config: {resolved.source}")
        _print(describe_step(config))
        return _end_dry_run(describe(plan, config), warnings)
    from rlinf.launch.disk import explain_full_disk
    from rlinf.report.page import write_report

    with explain_full_disk(config.runner.run_dir):
        code = _launch(args, resolved)
        sys.stderr.write(f"report: {write_report(config.runner.run_dir)}\n")
    return code


def _launch(args: argparse.Namespace, resolved: Resolved) -> int:
    """The whole run, or the half of it that --debug-rollout-only or --debug-train-only asks for."""
    if args.debug_rollout_only:
        from rlinf.launch.debug import rollout_only

        return rollout_only(resolved)
    if args.debug_train_only:
        from rlinf.launch.debug import train_only

        return train_only(resolved, args.debug_train_only)
    from rlinf.launch.train import train as whole

    return whole(resolved)


@command(
    "eval",
    "score models on benchmarks",
    arg("words", metavar="CONFIG|HF_DIR|key=value", nargs="+", help="a configuration, model folders or checkpoints, settings"),
)
def evaluate(args: argparse.Namespace) -> int:
    from rlinf.evaluation.evaluate import main as evaluation

    return evaluation(args.words)


@command("sft", "fine-tune a model on prompts and responses", config_argument, DRY_RUN)
def sft(args: argparse.Namespace) -> int:
    from rlinf.checks.preflight import check_files, check_models, describe_sft_step
    from rlinf.config.load import load
    from rlinf.config.validate import validate_sft
    from rlinf.scheduling.placement import build_sft_plan, describe, nodes_of

    resolved = load(args.config, args.overrides)
    config = resolved.config
    validate_sft(config, resolved.provenance)
    _, warnings = check_models(config, args.dry_run)
    plan = build_sft_plan(config, nodes_of(config.cluster))
    warnings += check_files(config, args.dry_run)
    if args.dry_run:
        _print(f"config: {resolved.source}")
        _print(describe_sft_step(config))
        return _end_dry_run(describe(plan, config), warnings)
    from rlinf.launch.disk import explain_full_disk
    from rlinf.launch.sft import finetune

    with explain_full_disk(config.runner.run_dir):
        return finetune(resolved)


@command(
    "report",
    "one offline page of a run: curves, findings, samples, configuration",
    RUN_DIR,
    arg("--output", metavar="FILE", type=user_path, help="where to write it (default: RUN_DIR/report.html)"),
)
def report(args: argparse.Namespace) -> int:
    from rlinf.report.page import write_report

    _print(str(write_report(args.run_dir, args.output)))
    return 0


@command(
    "replay",
    "a journalled step again from disk, its metrics beside the recorded ones",
    RUN_DIR,
    arg("overrides", metavar="key=value", nargs="*", default=[], help="another layout, say: cluster.num_gpus_per_node=2"),
    arg("--step", metavar="N", type=int, required=True),
    arg("--rollout", action="store_true", help="generate and judge its samples again too"),
    arg("--from-start", action="store_true", help="from the start model instead of the checkpoint before the step"),
    arg("--tolerance", type=tolerance, help="relative difference that counts as rounding (default 1e-5 in fp32, 0.02 in 16 bit)"),
)
def replay(args: argparse.Namespace) -> int:
    from rlinf.report.replay import replay as run_again

    return run_again(args.run_dir, args.step, args.overrides, args.rollout, args.from_start, args.tolerance)


@command(
    "plan",
    "placement, memory of every rank, expected time of a step; what to change when it does not fit",
    config_argument,
    arg("--device", metavar="NAME", help="h100 (default), h200, h800, h20, a100, a100-40g, l40s, rtx4090 or cpu"),
    arg("--mean-response", type=whole(1, 2**31 - 1), metavar="TOKENS", help="mean length of a response, for the time of a step"),
    AS_JSON,
)
def plan(args: argparse.Namespace) -> int:
    from rlinf.checks.plan import main as plan
    from rlinf.config.load import load

    return plan(load(args.config, args.overrides), args.device, args.mean_response, args.json)


@command("watch", "what a run is doing now", RUN_DIR, arg("--once", action="store_true", help="show it once and return"))
def watch(args: argparse.Namespace) -> int:
    from rlinf.report.watch import watch as show

    return show(args.run_dir, args.once)


@command("doctor", "is this machine (and the cluster that is up on it) ready; with CONFIG, for that run", optional_config, AS_JSON)
def doctor(args: argparse.Namespace) -> int:
    from rlinf.checks.doctor import main as examine
    from rlinf.config.load import load

    return examine(load(args.config, args.overrides) if args.config else None, args.json)


@command("config show", "the resolved configuration, each value with who set it", config_argument)
def config_show(args: argparse.Namespace) -> int:
    from rlinf.config.load import load, to_yaml

    sys.stdout.write(to_yaml(load(args.config, args.overrides)))
    return 0


@command(
    "config explain",
    "meaning, type, default and choices of a key or a section; with CONFIG its value and who set it",
    arg("key", metavar="KEY"),
    optional_config,
)
def config_explain(args: argparse.Namespace) -> int:
    from rlinf.config.explain import explain
    from rlinf.config.load import load

    _print(explain(load(args.config, args.overrides) if args.config else None, args.key))
    return 0


@command(
    "data generate",
    "problems for training: train.jsonl and a held-out val.jsonl",
    arg("out_dir", metavar="OUT_DIR", type=user_path),
    arg("--task", default="arithmetic", help="`arithmetic` (default) or `rg/<family>` of reasoning-gym, several with commas"),
    arg("--train", type=int, default=1300, help="training problems of each task (default 1300)"),
    arg("--val", type=int, default=256, help="held-out problems of each task (default 256)"),
    arg("--seed", type=SEED, default=1234),
)
def data_generate(args: argparse.Namespace) -> int:
    if args.task == "arithmetic":
        from rlinf.data.arithmetic import generate

        _print_result(generate(args.out_dir, args.train, args.val, args.seed))
    else:
        from rlinf.rewards.reasoning_gym import generate_files

        _print_result(generate_files(args.out_dir, args.task.split(","), args.train, args.val, args.seed))
    return 0


@command(
    "data convert",
    "a benchmark's public file to the AReaL-boba format",
    arg("benchmark", metavar="BENCHMARK", help="aime24, aime25, gpqa_diamond, math500 or gsm8k"),
    arg("source", metavar="FILE", type=user_path, help=".jsonl, .json, .csv or .parquet"),
    arg("out", metavar="OUT", type=user_path),
    arg("--seed", type=SEED, default=1234, help="of the order of GPQA's options"),
)
def data_convert(args: argparse.Namespace) -> int:
    from rlinf.evaluation.convert import convert

    _print_result(convert(args.benchmark, args.source, args.out, args.seed))
    return 0


@command(
    "data import",
    "a training file of any file with questions and answers",
    arg("source", metavar="FILE", type=user_path, help=".jsonl, .json, .csv or .parquet"),
    arg("out", metavar="OUT", type=user_path),
    arg("--prompt", required=True, metavar="FIELD", help="field of the question, a text or chat messages; a dot leads into a field"),
    arg("--answer", required=True, metavar="FIELD", help="field of the answer, or of a list of answers, any of which is right"),
    arg("--after", default="", metavar="TEXT", help="take of an answer what stands behind the last TEXT, such as '####' for GSM8K"),
    arg("--id", metavar="FIELD", help="field of the problem's id (default: the file's name and the row's number)"),
    arg("--metadata", metavar="FIELD", help="field that functions of the reward are to see"),
    arg("--task", default="math", help="how answers are judged (default math)"),
    arg("--instruction", default=INSTRUCTION, metavar="TEXT", help=f"line behind each question (default: {INSTRUCTION}); '' for none"),
    arg("--skip-bad", action="store_true", help="leave out rows that cannot be used, and say which"),
)
def data_import(args: argparse.Namespace) -> int:
    from rlinf.data.foreign import import_file

    fields = {"name": args.id, "metadata": args.metadata}
    how = {"after": args.after, "task": args.task, "instruction": args.instruction, "skip_bad": args.skip_bad}
    _print_result(import_file(args.source, args.out, args.prompt, args.answer, **fields, **how))
    return 0


@command("data check", "check a JSONL file in the AReaL-boba format", arg("file", metavar="FILE", type=user_path), DATA_CONFIG, AS_JSON)
def data_check(args: argparse.Namespace) -> int:
    from rlinf.checks.data_check import main as check

    config = _load_for_judging(args.config)
    return check(args.file, args.json, config.reward, config.data)


@command(
    "check layout",
    "the same step in every parallel layout, packing and order, against plain transformers",
    QUICK,
    JSON_FILE,
)
def check_layout(args: argparse.Namespace) -> int:
    from rlinf.checks.layout import main as check

    return check(args.quick, args.json)


@command("check sync", "the actor's weights in the engines, from every layout by every transport", QUICK, JSON_FILE)
def check_sync(args: argparse.Namespace) -> int:
    from rlinf.checks.sync import main as check

    return check(args.quick, args.json)


@command(
    "check resume",
    "kill tiny runs at many instants, go on, and compare with runs that nobody killed",
    arg("--quick", action="store_true", help="five kills, all in one process"),
    JSON_FILE,
    arg("--seed", type=SEED, default=0, help="of the instants (default 0)"),
)
def check_resume(args: argparse.Namespace) -> int:
    from rlinf.checks.resume import main as check

    return check(args.quick, args.json, args.seed)


@command(
    "export",
    "a checkpoint's weights as a Hugging Face model folder",
    arg("step_dir", metavar="STEP_DIR", type=user_path, help="checkpoints/step_* of a run"),
    arg("out", metavar="OUT_HF_DIR", type=user_path, help="a folder that does not exist yet"),
    arg("--dtype", choices=("fp32", "bf16", "fp16"), help="default: that of hf/, or else of the model; fp32 with --adapters"),
    arg(
        "--model-dir",
        metavar="HF_DIR",
        type=user_path,
        help="configuration and tokenizer, and of a run with adapters the weights; default: hf/, or else the run's rollout.model_dir",
    ),
    arg("--adapters", action="store_true", help="the adapters alone, as PEFT has them (of a run with actor.lora)"),
)
def export(args: argparse.Namespace) -> int:
    from rlinf.run_folder import export as write

    if args.adapters:
        _print_result(write.export_adapters(args.step_dir, args.out, args.dtype))
    else:
        _print_result(write.export(args.step_dir, args.out, args.dtype, args.model_dir))
    return 0


@command(
    "compare",
    "where two runs part, and why",
    arg("run_a", metavar="RUN_A", type=user_path),
    arg("run_b", metavar="RUN_B", type=user_path),
    arg("--tolerance", type=tolerance, default=1e-6, help="relative difference of a metric that counts as rounding (default 1e-6)"),
    AS_JSON,
)
def compare(args: argparse.Namespace) -> int:
    from rlinf.report.compare import main as compare_runs

    return compare_runs(args.run_a, args.run_b, args.tolerance, args.json)


@command(
    "verify",
    "grade a JSONL file of responses",
    arg("input", metavar="IN", type=user_path),
    arg("output", metavar="OUT", type=user_path),
    REWARD_CONFIG,
    arg("--processes", type=whole(1, 1024), default=cores(), help="of the verifier, and of each function of yours (default: one a core)"),
)
def verify(args: argparse.Namespace) -> int:
    from rlinf.rewards.verify_file import verify_file

    _print_result(verify_file(args.input, args.output, args.processes, _load_for_judging(args.config)))
    return 0


def _load_for_judging(config: str | None) -> Config:
    """The configuration of that name, or the defaults, with a placeholder for the model folder: judging needs no model."""
    from rlinf.config.load import load
    from rlinf.config.validate import validate_judging

    resolved = load(config, ["rollout.model_dir=none"])
    validate_judging(resolved.config, resolved.provenance)
    return resolved.config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlinf", description="Reinforcement learning for reasoning models.")
    commands = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for name, help, arguments, run in COMMANDS:
        group, _, last = name.rpartition(" ")
        if group not in commands:
            commands[group] = commands[""].add_parser(group, help=GROUPS[group]).add_subparsers(required=True, metavar="COMMAND")
        one = commands[group].add_parser(last, help=help)
        for argument in arguments:
            argument(one)
        one.set_defaults(run=run)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that stand behind an option: `train CONFIG --dry-run key=value`
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        settings = [word.lstrip("-") for word in rest if re.match(r"--?[a-z_]+(\.\w+)+=", word)]
        parser.error(f"unrecognized arguments: {' '.join(rest)}" + (f"; write {' '.join(settings)}" if settings else ""))
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _end_dry_run(placement: str, warnings: Sequence[str]) -> int:
    _print(placement)
    for warning in warnings:
        _print(f"warning: {warning}")
    _print("dry run: the configuration is valid; nothing was started")
    return 0


def _print_result(result: dict[str, Any]) -> None:
    for name, value in result.items():
        _print(f"{name}: {value if isinstance(value, (str, int, float, Path)) else json.dumps(value, default=str)}")


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
