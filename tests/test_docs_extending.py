"""The examples of docs/extending.md, as they stand there: each is used as the page says, and does what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from rlinf.algorithms.advantages import ADVANTAGES
from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.losses import LOSSES
from rlinf.algorithms.objective import ResponseTokens, policy_objective
from rlinf.config.algorithm import AlgorithmConfig
from rlinf.config.load import ROOT, load
from rlinf.config.schema import Config, RewardConfig
from rlinf.config.validate import validate
from rlinf.data.records import Finish, Status, Verdict
from rlinf.errors import UserError
from rlinf.rewards import pool
from rlinf.rewards.own import Response
from rlinf.rewards.own_parts import OwnParts
from rlinf.rewards.tasks import check_tasks
from rlinf.rewards.verifier import Item, Verifier
from rlinf.rewards.whole import Answer, response_of
from rlinf.runners.selection import group_advantages
from rlinf.workers.objective_settings import objective_settings
from tests.tiny_run import ONE_PROCESS, lines, run, write_run

PAGE = (ROOT / "docs" / "extending.md").read_text()
PYTHON = {name: code for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)}
YAML = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, from which runs are started."""
    for name, code in PYTHON.items():
        if "/" not in name:
            (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(folder: Path, *words: str) -> Config:
    """The page's YAML over a complete configuration."""
    sections: dict[str, dict] = {}
    for part in YAML:
        for section, keys in part.items():
            sections.setdefault(section, {}).update(keys)
    (folder / "page.yaml").write_text(
        yaml.safe_dump({"extends": str(ROOT / "examples/math/config/smollm2-135m-grpo-cpu.yaml"), **sections})
    )
    config = load("page.yaml", words).config
    validate(config)
    return config


def test_the_page_names_its_files_as_its_yaml_does(files: Path) -> None:
    config = resolved(files)
    reward = config.reward
    own = *reward.own_tasks.values(), *reward.own_parts.values(), *reward.own_group_parts.values()
    named = [*own, config.algorithm.loss_type, config.algorithm.adv_type]
    files_of_parts = *["my_parts.py"] * 2, *["my_judge.py"] * 2
    assert [Path(n.rpartition(":")[0]).name for n in named] == ["my_rewards.py", *files_of_parts, "my_losses.py", "my_advantages.py"]
    assert all(Path(n.rpartition(":")[0]).is_absolute() for n in named)


def test_the_reward(files: Path) -> None:
    own = resolved(files).reward.own_tasks
    check_tasks(["interval", "math"], own)
    with Verifier(own_tasks=own) as verifier:
        answers = (r"\boxed{from 3 to 5}", r"\boxed{between 5 and 3.0}", r"\boxed{3}", "between 3 and 5", r"\boxed{3 to 6}")
        found = [verifier.verify(text, [r"\boxed{between 3 and 5}"], "interval") for text in answers]
        assert [v.status for v in found] == [Status.RIGHT, Status.RIGHT, Status.WRONG, Status.WRONG, Status.WRONG]
        assert found[0].route == "own" and found[0].reward == 5.0 and found[3].route == "no_box"
        assert verifier.verify(r"\boxed{7}", [r"\boxed{7}"], "math").status is Status.RIGHT


def test_a_function_that_hangs_fails_or_cannot_tell_leaves_the_answer_undecided(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "def judge(answer, solutions):\n    while answer == 'hang': pass\n"
        "    return None if answer == 'unsure' else {'right': True}[answer]\n"
    )
    with Verifier(own_tasks={"odd": f"{tmp_path}/odd.py:judge"}, timeout=1.0) as verifier:
        found = {word: verifier.verify(f"\\boxed{{{word}}}", ["x"], "odd") for word in ("right", "unsure", "other", "hang")}
    assert [v.status for v in found.values()] == [Status.RIGHT, *[Status.UNDECIDED] * 3]
    assert found["other"].route == "own_failed" and "KeyError" in found["other"].reason and found["hang"].route == "timeout"


def test_the_reason_of_an_answer_that_a_function_fails_on_is_told(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "class Mine(Exception): pass\ndef judge(answer, solutions):\n    if answer == 'typo': return anser\n"
        "    if answer == 'mine': raise Mine('no luck')\n"
        "    return {'score': 0.1, 'penalty': -1.0, 'text': 'no', 'one': 1.0, 'zero': 0}[answer]\n"
    )
    with Verifier(own_tasks={"odd": f"{tmp_path}/odd.py:judge"}, timeout=5.0) as verifier:
        words = ("typo", "mine", "score", "penalty", "text", "one", "zero")
        found = [verifier.verify(f"\\boxed{{{word}}}", ["x"], "odd") for word in words]
    assert [v.status for v in found] == [*[Status.UNDECIDED] * 5, Status.RIGHT, Status.WRONG]
    reasons = [v.reason for v in found]
    assert reasons[0] == "NameError: name 'anser' is not defined (odd.py:3)" and reasons[1] == "Mine: no luck (odd.py:4)"
    assert reasons[2] == "TypeError: it returned 0.1; a function of reward.own_tasks returns True, False or None"
    assert [v.route for v in found[:3]] == ["own_failed", "died", "own_failed"]


def response(text: str, verdict: Verdict, tokens: int, finish: Finish, **metadata: object) -> Response:
    return response_of(Answer(Item(text, ("3",), "math", "Q"), tokens, finish.cut_off, metadata), verdict)


def test_the_parts_of_a_reward(files: Path) -> None:
    config = resolved(files)
    right, wrong = (Verdict(reward, status, "3", "simple", 0.0) for reward, status in ((5.0, Status.RIGHT), (-5.0, Status.WRONG)))
    parts = OwnParts(replace(config.reward, own_group_parts={}), 1)
    try:
        texts = (("short", right, 100), ("long", right, 900), ("1 + 2 = 3, 3 + 1 = 4", wrong, 100))
        responses = [response(text, verdict, tokens, Finish.STOP) for text, verdict, tokens in texts]
        found = parts.add([verdict for _, verdict, _ in texts], responses)
    finally:
        parts.close()
    assert [v.reward for v in found] == [5.75, 5.0, -4.5] and [v.status for v in found] == [Status.RIGHT, Status.RIGHT, Status.WRONG]
    assert found[0].parts == (("own/concise", 0.75), ("own/steps", 0.0)) and not any(v.failed for v in found)


class Judge(BaseHTTPRequestHandler):
    """Scores an answer by its length, but only when two requests are there at the same time."""

    together = threading.Barrier(2)

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.together.wait(20)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"score": len(question["answer"]) / 4}).encode())

    def log_message(self, *_: object) -> None: ...


def test_the_judge_on_another_machine(files: Path) -> None:
    config = resolved(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    (files / "my_judge.py").write_text(PYTHON["my_judge.py"].replace("http://judge-host:8000", f"http://127.0.0.1:{server.server_port}"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    verdicts = [Verdict(-5.0, Status.WRONG, answer, "number", 0.0) for answer in ("1", "2")]
    parts = OwnParts(replace(config.reward, own_parts={}), 1)
    try:
        found = parts.add(verdicts, [response(*of, 9, Finish.STOP) for of in zip(("no", "none"), verdicts, strict=True)])
        server.shutdown()
        server.server_close()
        failed = parts.add(verdicts, [response("no", verdict, 9, Finish.STOP) for verdict in verdicts])
    finally:
        parts.close()
    assert [v.parts for v in found] == [(("own/judge", 0.5), ("own/rare", 0.5)), (("own/judge", 1.0), ("own/rare", 0.5))]
    assert [v.reward for v in failed] == [-4.5, -4.5]
    assert "URLError" in (why := dict(failed[1].failed)["judge"]) and why.endswith("(my_judge.py:14)")


def test_a_part_that_cannot_be_had_is_0_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_SECONDS", 2.0)
    (tmp_path / "odd.py").write_text(
        "import time\ndef first(r):\n"
        "    return {'nan': float('nan'), 'text': '1', 'huge': 10 ** 400, 'one': True, 'answer': r.answer == '3'}[r.text]\n"
        "def second(r):\n    if r.text == 'nan': time.sleep(60)\n"
        "    return len(r.solutions) + (r.right is None) + r.cut_off / 2 + r.metadata['level']\n"
    )
    own = {"a": f"{tmp_path}/odd.py:first", "b": f"{tmp_path}/odd.py:second"}
    parts = OwnParts(RewardConfig(own_parts=own, own_timeout=2.0), 1)
    verdict = Verdict(-5.0, Status.UNDECIDED, "3", "timeout", 1.0, "it took long")
    words = ("nan", "text", "huge", "key", "one", "answer")
    try:
        found = parts.add([verdict] * len(words), [response(word, verdict, 9, Finish.LENGTH, level=4) for word in words])
    finally:
        parts.close()
    assert [tuple(dict(v.failed)) for v in found] == [("a", "b"), ("a",), ("a",), ("a",), (), ()]
    assert [v.reward for v in found] == [-5.0, 1.5, 1.5, 1.5, 2.5, 2.5]
    assert found[0].reason.startswith(
        "it took long; a: TypeError: it returned nan; a function of reward.own_parts returns a finite number; b: "
    )
    assert re.fullmatch(r"no result after 2\.\d s \(reward.own_timeout\); heavy imports belong .*", dict(found[0].failed)["b"])
    assert "it returned '1'" in found[1].reason and "OverflowError" in found[2].reason and "KeyError: 'key' (odd.py:3)" in found[3].reason


def test_a_tensor_or_array_of_one_number_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "kinds.py").write_text(
        "import numpy as np\n\nclass Tensor:\n    def item(self):\n        return 0.25\n\n"
        "KINDS = {'numpy': np.float32(0.5), 'array': np.array(2), 'tensor': Tensor(), 'two': np.array([1, 2]), 'text': np.array('1')}\n\n"
        "def part(r):\n    return KINDS[r.text]\n"
    )
    parts, verdict = (
        OwnParts(RewardConfig(own_parts={"a": f"{tmp_path}/kinds.py:part"}, timeout=9.0), 1),
        Verdict(0.0, Status.RIGHT, "3", "simple", 0.0),
    )
    words = ("numpy", "array", "tensor", "two", "text")
    try:
        found = parts.add([verdict] * len(words), [response(word, verdict, 9, Finish.STOP) for word in words])
    finally:
        parts.close()
    assert [v.reward for v in found] == [0.5, 2.0, 0.25, 0.0, 0.0] and [bool(v.failed) for v in found] == [False] * 3 + [True] * 2
    assert "it returned '1'" in found[4].reason


def test_names_that_lead_nowhere_are_refused(files: Path) -> None:
    with pytest.raises(UserError, match="math is judged here already"):
        check_tasks([], {"math": "my_rewards.py:same_interval"})
    with pytest.raises(UserError, match="interval: same_interval names no function"):
        validate(load("smollm2-135m-grpo-cpu", ["reward.own_tasks={interval: same_interval}"]).config)
    with pytest.raises(UserError, match="or path/to/file.py:function"):
        load("smollm2-135m-grpo-cpu", ["algorithm.loss_type=mine"])
    for name, expected in (("my_losses.py:hard_clip", "has no function hard_clip"), ("none.py:f", "there is no file")):
        with pytest.raises(UserError, match=expected):
            objective_settings(AlgorithmConfig(loss_type=name))


def test_the_loss_is_the_formula_and_its_gradient_turns_round(files: Path) -> None:
    settings = objective_settings(resolved(files).algorithm)
    ratio = torch.tensor([0.5, 1.0, 1.1, 1.5, 3.0, 0.5])
    sign = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    logprobs = ratio.log().requires_grad_()
    batch = ResponseTokens(
        logprobs, torch.zeros(6), torch.zeros(6), torch.zeros(6), None, sign, torch.ones(6), torch.zeros(6, dtype=torch.int64), 1
    )
    loss, metrics = policy_objective(batch, Denominators(6, 1), settings)
    beyond = torch.tensor([0.0, 0.0, 0.0, 0.3, 1.8, 0.3])
    assert loss.item() == pytest.approx(((-ratio * sign + beyond**2).sum() / 6).item(), rel=1e-6)
    assert metrics.sums["clipped"].item() == 3
    loss.backward()
    assert logprobs.grad is not None and (logprobs.grad < 0).tolist() == [True, True, False, True, False, False]


@pytest.mark.parametrize(
    "returned, told",
    [("(-logprobs * advantages).mean()", "returned a Tensor; a loss returns TokenLosses"),
     ("TokenLosses((-logprobs * advantages).mean(), old > 0, old > 0)", "returned loss_N []; a loss returns TokenLosses"),
     ("TokenLosses(-logprobs * advantages, 0, old > 0)", "returned clipped_N int;"),
     ("TokenLosses(-old * advantages, old > 0, old > 0)", "returned a loss_N without gradient")],
)  # fmt: skip
def test_a_loss_that_is_not_one_number_a_token_is_refused(tmp_path: Path, returned: str, told: str) -> None:
    (tmp_path / "odd.py").write_text(
        "from rlinf.algorithms.losses import TokenLosses\n"
        f"def loss(logprobs, old, advantages, sample, n_samples, clip):\n    return {returned}\n"
    )
    settings = objective_settings(AlgorithmConfig(loss_type=f"{tmp_path}/odd.py:loss"))
    logprobs, ones = torch.zeros(3, requires_grad=True), torch.ones(3)
    batch = ResponseTokens(logprobs, ones, ones, ones, None, ones, ones, torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(UserError, match=re.escape(told)):
        policy_objective(batch, Denominators(3, 1), settings)


def test_the_dual_clip_constant_reaches_a_loss(files: Path) -> None:
    assert objective_settings(resolved(files, "algorithm.clip_ratio_c=3").algorithm).clip_c == 3.0


@pytest.mark.parametrize("returned", ["(rewards - rewards.mean()) / rewards.std()", "rewards[1:]", "rewards[:, None]"])
def test_an_advantage_that_is_not_one_finite_number_a_response_is_refused(tmp_path: Path, returned: str) -> None:
    (tmp_path / "odd.py").write_text(
        f"import numpy\ndef estimate(rewards):\n    with numpy.errstate(all='ignore'):\n        return {returned}\n"
    )
    group = type("Header", (), {"rewards": [5.0, 5.0, 5.0], "loss_tokens": [3, 2, 4], "finishes": [None] * 3})
    expected = r"odd\.py:estimate made .* of the rewards \[5\.0, 5\.0, 5\.0\]; it must return one finite number for each"
    with pytest.raises(UserError, match=expected):
        group_advantages([group], AlgorithmConfig(adv_type=f"{tmp_path}/odd.py:estimate"))  # type: ignore[list-item]


def test_the_advantage(files: Path) -> None:
    config = resolved(files, "algorithm.normalize_advantages=false")
    group = type("Header", (), {"rewards": [5.0, -5.0, 5.0], "loss_tokens": [3, 2, 4], "finishes": [None] * 3})
    (found,) = group_advantages([group], config.algorithm)  # type: ignore[list-item]
    assert found.tolist() == [0.0, -10.0, 0.0]


def test_functions_of_the_users_own_do_not_join_the_built_in_ones(files: Path) -> None:
    ours, algorithm = (dict(LOSSES), dict(ADVANTAGES)), resolved(files).algorithm
    group = type("Header", (), {"rewards": [5.0, -5.0], "loss_tokens": [3, 2], "finishes": [None] * 2})
    group_advantages([group], algorithm)  # type: ignore[list-item]
    assert objective_settings(algorithm).loss.__name__ == "soft_clip" and (LOSSES, ADVANTAGES) == ours
    with pytest.raises(ValueError, match="loss_type must be one of"):
        replace(objective_settings(algorithm), own_loss=None)


def test_an_advantage_with_a_second_parameter_sees_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def by_length(rewards_G, tokens_G):\n    return rewards_G / tokens_G\n"
        "def scaled(rewards_G, scale=2):\n    return rewards_G * scale\n"
    )
    group = type("Header", (), {"rewards": [6.0, -6.0, 3.0], "loss_tokens": [3, 2, 4], "finishes": [None] * 3})
    found = [
        group_advantages([group], AlgorithmConfig(adv_type=f"{tmp_path}/mine.py:{name}", normalize_advantages=False))[0].tolist()  # type: ignore[list-item]
        for name in ("by_length", "scaled")
    ]
    assert found == [[2.0, -3.0, 0.75], [12.0, -12.0, 6.0]]


@pytest.mark.slow
def test_a_run_with_all_of_them(files: Path) -> None:
    own = {name: value for part in YAML for name, value in part.get("reward", {}).items()}
    config = write_run(
        files, cluster__backend="local", cluster__num_gpus_per_node=1, cluster__component_placement={"actor,rollout,reward": "0"},
        actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1,
        reward__own_tasks=own["own_tasks"], reward__own_parts=own["own_parts"], reward__exploration_penalty=1.0,
        reward__own_group_parts={"rare": own["own_group_parts"]["rare"]}, reward__own_timeout=own["own_timeout"],
        algorithm__loss_type="my_losses.py:soft_clip", algorithm__adv_type="my_advantages.py:behind_the_best",
    )  # fmt: skip
    data = files / "data.jsonl"
    data.write_text(data.read_text().replace('"math"', '"interval"'))
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = lines(files)[1:]
    assert len(steps) == 3 and any(m["train/grad_norm"] > 0 for m in steps) and all(m["rollout/advantages_max"] < 3 for m in steps)
    (environment,) = [json.loads(line) for line in (files / "logs/tiny/environment.jsonl").open()]
    assert [name.rpartition(" ")[2] for name in environment["own_code"]] == [
        "my_advantages.py:behind_the_best",
        "my_losses.py:soft_clip",
        "my_rewards.py:same_interval",
        "my_parts.py:concise",
        "my_parts.py:steps",
        "my_judge.py:rare",
    ]
    assert all(m["rollout/own_parts_failed"] == 0 and 0 <= m["rollout/reward_own/steps"] <= 1 for m in steps)
    assert all(0 <= m["rollout/reward_own/rare"] < 1 for m in steps)
    assert {json.loads(line)["task"] for line in (files / "logs/tiny/samples/step_000001.jsonl").open()} == {"interval"}


@pytest.mark.slow
def test_a_part_that_fails_is_told_by_the_first_validation(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def broken(response):\n    return 1 / 0\n")
    done = run(write_run(tmp_path, reward__own_parts={"broken": f"{tmp_path}/mine.py:broken"}, **ONE_PROCESS), "runner.max_steps=1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line for line in done.stderr.splitlines() if "reward.own_parts" in line] == [
        "step 0, validation: reward.own_parts broken failed for all 24 responses, so its part is 0: ZeroDivisionError: division by zero "
        "(mine.py:2)"
    ]


MISTRAL = """
import asyncio, json, sys
import numpy as np, torch
from pathlib import Path
from transformers import MistralConfig, MistralForCausalLM
from rlinf.weights import architecture

exec(sys.argv[2], vars(architecture))
folder = Path(sys.argv[1])
shape = dict(
    vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12
)
torch.manual_seed(0)
model = MistralForCausalLM(MistralConfig(**shape, sliding_window=None, max_position_embeddings=64, rms_norm_eps=1e-6))
for p in model.parameters():
    torch.nn.init.normal_(p, 0.7 if p.ndim == 1 else 0.0, 0.12)
model.save_pretrained(folder)
(folder / "tokenizer.json").write_text("{}")
hf = json.loads((folder / "config.json").read_text())

from rlinf.config.schema import ActorModelConfig, OptimConfig
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.training import parallel
from rlinf.training.engine import MegatronEngine
from rlinf.training.publishing import sequence_logprobs
from rlinf.weights.source import Disk
from rlinf.weights.tensor_folder import open_hf_folder

tokens = np.random.default_rng(0).integers(0, 131, 40)
wanted = model(torch.tensor(tokens)[None]).logits[0].log_softmax(-1)[torch.arange(39), torch.tensor(tokens[1:])].detach().numpy()
engine = EmbeddedEngine(str(folder), dtype="fp32", slots=1, max_context=64, seed=0, decode=str)
asyncio.run(engine.load_weights(Disk(str(folder)), 0))
rollout = asyncio.run(engine.sequence_logprobs([tokens]))[0]
at = parallel.initialize(1, 1, rank=0, world_size=1, device=torch.device("cpu"), address="127.0.0.1:" + sys.argv[3])
actor = MegatronEngine(architecture.read_architecture(hf), ActorModelConfig(precision="fp32"), OptimConfig(), at, torch.device("cpu"), "lm")
actor.load_hf(open_hf_folder(str(folder)))
trained = sequence_logprobs(actor, [tokens])[0]
print(json.dumps([float(abs(rollout - wanted).max()), float(abs(trained - wanted).max()), float(wanted.std())]))
try:
    architecture.read_architecture(hf | {"sliding_window": 4096})
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_the_family_agrees_with_transformers(tmp_path: Path) -> None:
    from rlinf.hardware import free_port

    code = PYTHON["rlinf/weights/architecture.py"]
    command = [sys.executable, "-c", MISTRAL, str(tmp_path), code, str(free_port("127.0.0.1"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    *_, numbers, refusal = done.stdout.splitlines()
    rollout, trained, spread = json.loads(numbers)
    assert rollout < 1e-4 and trained < 1e-4 and spread > 0.1
    assert "sliding-window attention is not supported" in refusal


def test_without_the_row_the_family_is_refused() -> None:
    from rlinf.weights.architecture import read_architecture

    with pytest.raises(UserError, match="'mistral'; supported are qwen2, qwen3, llama"):
        read_architecture({"model_type": "mistral"})
