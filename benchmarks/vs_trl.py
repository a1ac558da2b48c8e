"""A whole GRPO step beside TRL's GRPOTrainer on the same machine: 8 prompts x 8 samples, 75-token prompts, SmolLM2-135M.

    python -m benchmarks.vs_trl MODEL_DIR [--cases 20 256] [--precision auto] [--trl-weights bfloat16] [--threads 2] [--venv DIR]

Makes TRL's own environment (benchmarks/requirements-trl.txt) in DIR, by default $RLINF_CACHE/trl-venv, if it is not there. Then starts both
sides, each the trainer in one process, and lets them take steps in turn, TRL first in one pair and we in the next, one side at rest while
the other works. A step is everything: generation, rewards, training, and on our side new weights for the engine. Both get the same prompts
(the quickstart's two examples and a question, cut to 75 tokens), take the end token for one like others, so that every response has the
asked number of tokens, and have the same allocator and OpenMP settings. The first step of each side is not counted; TRL's stops at 20
tokens there, to save time. Memory is the largest PSS of a side's processes within a counted step. TRL's settings stand in
benchmarks/trl_side.py, ours in examples/math/config/smollm2-135m-grpo-cpu.yaml, with cluster.backend: local.

--precision is that of both sides, by default the one that this machine multiplies faster. In bf16 --trl-weights float32 is another case:
TRL with fp32 weights under bf16 autocast, as it loads a model by default, and an optimizer state as precise as ours.

Case 20 measures 3 steps in about three minutes, case 256 one step in about six. Writes benchmarks/results/vs_trl.json, case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.settings import machine, worker_environment
from rlinf.cluster.usage import pss_bytes
from rlinf.data.tokenizer import TextTokenizer, load_tokenizer
from rlinf.hardware import fast_precision

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "vs_trl.json"
CACHE = Path(os.environ.get("RLINF_CACHE") or Path.home() / ".cache" / "rlinf")
REQUIREMENTS = HERE / "requirements-trl.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROMPT_TOKENS, PROMPTS, SAMPLES = 75, 8, 8
STEPS = {20: 3, 256: 1}  # new tokens -> steps that count
TRAINED_TOKENS = {20: 256, 256: 1100}  # at a time: a group; half of one
FIRST_NEW_TOKENS = 20  # of TRL's step that does not count
FASTER = 3.0  # aim
LOOK = {20: 1.0, 256: 5.0}  # seconds between two looks at memory: each walks over all of it and slows the side down


class Side:
    """One trainer in processes of its own that takes a step when told to."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: dict[str, str], log: Path, look: float) -> None:
        self.name, self.log, self.look = name, log, look
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=HERE.parent,
            )
        self.answer()

    def answer(self) -> dict[str, Any]:
        line = self._pipe(self.process.stdout).readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """What it says of its step, with the largest memory seen meanwhile."""
        done, peak = threading.Event(), [0]

        def watch() -> None:
            while not done.wait(self.look):
                peak[0] = max(peak[0], memory(self.process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            pipe = self._pipe(self.process.stdin)
            pipe.write("go\n")
            pipe.flush()
            return self.answer() | {"peak_pss_bytes": max(peak[0], memory(self.process.pid))}
        finally:
            done.set()
            watcher.join()

    def close(self) -> None:
        self._pipe(self.process.stdin).close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def memory(pid: int) -> int:
    """PSS of a process and its descendants."""
    total = 0
    for process in (root := psutil.Process(pid), *root.children(recursive=True)):
        try:
            total += pss_bytes(process.pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return total


def cut_prompts(rows: Sequence[dict[str, Any]], tokenizer: TextTokenizer, count: int) -> list[dict[str, Any]]:
    """The first rows whose last PROMPT_TOKENS tokens make a text that has just these tokens again."""
    found = []
    for row in rows:
        text = tokenizer.decode(tokenizer.encode(row["prompt"])[-PROMPT_TOKENS:])
        if len(tokenizer.encode(text)) == PROMPT_TOKENS:
            found.append({"prompt": text, "task": row["task"], "query_id": row["query_id"], "solutions": row["solutions"]})
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} of {len(rows)} prompts can be cut to {PROMPT_TOKENS} tokens; {count} are needed")


def make_venv(venv: Path) -> Path:
    """TRL's environment, made when its requirements are not those it was made with. Returns its Python."""
    python, stamp = venv / "bin" / "python", venv / "requirements"
    if stamp.is_file() and stamp.read_text() == REQUIREMENTS.read_text():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "-r", REQUIREMENTS]
    if subprocess.run(install, stderr=subprocess.DEVNULL).returncode:  # first from where pip looks anyway
        subprocess.run([*install, "--extra-index-url", TORCH_CPU_INDEX], check=True)
    stamp.write_text(REQUIREMENTS.read_text())
    return python


def sides(args: argparse.Namespace, python: Path, new_tokens: int, work: Path) -> dict[str, Side]:
    """Both, started one after the other and waiting."""
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    steps = STEPS[new_tokens] + 1
    data = work / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in cut_prompts(rows, load_tokenizer(str(args.model_dir)), PROMPTS * steps)))
    environment = os.environ | worker_environment() | {"OMP_NUM_THREADS": str(args.threads)}
    trl = [
        python,
        HERE / "trl_side.py",
        args.model_dir,
        data,
        new_tokens,
        steps,
        FIRST_NEW_TOKENS,
        args.threads,
        args.trl_weights,
        args.precision,
        work / "trl",
    ]
    words = [
        "cluster.backend=local", f"cluster.threads_per_worker={args.threads}", f"runner.output_dir={work}", f"runner.max_steps={steps}",
        f"actor.model.precision={args.precision}",
        "rollout.offload=true", f"runner.max_tokens_per_mbs={TRAINED_TOKENS[new_tokens]}",
        "runner.val_check_interval=0", "runner.save_interval=0", "runner.keep_groups=0", "runner.phase_timeout=-1",
        f"runner.seq_length={PROMPT_TOKENS + new_tokens}", f"rollout.model_dir={args.model_dir}", f"data.train_data_paths=[{data}]",
        "data.val_data_paths=[]", f"data.max_prompt_length={PROMPT_TOKENS}", f"data.rollout_batch_size={PROMPTS}",
        f"algorithm.group_size={SAMPLES}", f"algorithm.sampling_params.max_new_tokens={new_tokens}", "algorithm.sampling_params.stop=[]",
    ]  # fmt: skip
    ours = [sys.executable, "-m", "benchmarks.rlinf_side", "smollm2-135m-grpo-cpu", *words]
    commands, look = {"trl": trl, "rlinf": ours}, LOOK[new_tokens]
    return {name: Side(name, command, environment, work / f"{name}.log", look) for name, command in commands.items()}


def judge(steps: dict[str, list[dict[str, Any]]], new_tokens: int) -> dict[str, Any]:
    """Medians of both sides and what they say. Raises ValueError when a side did not do the work that was asked for."""
    for name, taken in steps.items():
        for step in taken:
            if step["response_tokens"] != [new_tokens] or step["prompt_tokens"] != [PROMPT_TOKENS] or step["samples"] != PROMPTS * SAMPLES:
                raise ValueError(f"{name} did other work than was asked for: {step}")
    seconds = {name: statistics.median(s["seconds"] for s in taken) for name, taken in steps.items()}
    peak = {name: max(s["peak_pss_bytes"] for s in taken) / 2**30 for name, taken in steps.items()}
    ratio = seconds["trl"] / seconds["rlinf"]
    return {
        "seconds": seconds, "new_tokens_per_second": {name: PROMPTS * SAMPLES * new_tokens / s for name, s in seconds.items()},
        "peak_gib": peak, "faster": ratio, "aim": FASTER, "reached": ratio >= FASTER and peak["rlinf"] < peak["trl"],
    }  # fmt: skip


def measure(args: argparse.Namespace, python: Path, new_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as folder:
        both = sides(args, python, new_tokens, Path(folder))
        try:
            for side in both.values():
                side.step()  # not counted
            taken: dict[str, list[dict[str, Any]]] = {name: [] for name in both}
            for pair in range(STEPS[new_tokens]):
                for name in list(both)[:: -1 if pair % 2 else 1]:
                    taken[name].append(both[name].step())
                    sys.stdout.write(f"{new_tokens} new tokens, {name}: {json.dumps(taken[name][-1])}\n")
                    sys.stdout.flush()
        finally:
            for side in both.values():
                side.close()
    return judge(taken, new_tokens) | {"steps": taken, "machine": machine(args.threads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--data", type=Path, default=CACHE / "data" / "arithmetic" / "train.jsonl")
    parser.add_argument("--cases", type=int, nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--precision", default=fast_precision("cpu"), choices=("fp32", "bf16"))
    parser.add_argument("--trl-weights", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--venv", type=Path, default=CACHE / "trl-venv")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.precision == "fp32":
        args.trl_weights = "float32"
    python = make_venv(args.venv.absolute())
    cases = json.loads(args.out.read_text())["cases"] if args.out.exists() else {}
    for new_tokens in args.cases:
        name = (
            f"{new_tokens}{', fp32' if args.precision == 'fp32' else '' if args.trl_weights == 'bfloat16' else ', TRL with fp32 weights'}"
        )
        cases[name] = case = measure(args, python, new_tokens)
        pins = [line.split()[0] for line in REQUIREMENTS.read_text().splitlines() if line.startswith(("trl", "torch", "transformers"))]
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps({"model": args.model_dir.name, "trl": pins, "cases": cases}, indent=1) + "\n")
        sys.stdout.write(f"{new_tokens} new tokens: {case['faster']:.2f} x faster; GiB {case['peak_gib']}; reached {case['reached']}\n")


if __name__ == "__main__":
    main()
