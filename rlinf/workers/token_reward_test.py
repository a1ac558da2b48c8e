"""Token rewards are those of plain transformers, token by token, whatever the layout, the packing and the split."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlinf.checks.tiny_model import VOCAB, write_tiny_model
from rlinf.config.schema import Config
from rlinf.data.packing import build_rank_batches
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.errors import UserError
from rlinf.scheduling.placement import WorkerAddress
from rlinf.training.model import with_scoring_head
from rlinf.workers.token_reward import read_to_the_end, response_score

HIDDEN = 32


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A …ForTokenClassification with a bias by its number of labels."""
    folder, found = tmp_path_factory.mktemp("scorers"), {}
    for labels in (1, 2):
        path = write_tiny_model(folder / str(labels), "qwen2", seed=3, head="scalar")
        generator = torch.Generator().manual_seed(labels)
        head = {"score.weight": torch.randn(labels, HIDDEN, generator=generator), "score.bias": torch.randn(labels, generator=generator)}
        save_file(load_file(path / "model.safetensors") | head, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        config |= {"architectures": ["Qwen2ForTokenClassification"], "id2label": {str(i): f"label {i}" for i in range(labels)}}
        (path / "config.json").write_text(json.dumps(config))
        found[labels] = path
    return found


def groups() -> list[Group]:
    """Prompts of several lengths, responses of one token and of many; a token in five was not sampled by the policy."""
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(0, VOCAB, n).astype(np.int32)
    out = []
    for g, (prompt, lengths) in enumerate([(7, (3, 9, 1)), (2, (5, 5)), (12, (1, 2, 14, 6)), (5, (8,))]):
        samples = [
            Sample(f"g{g}/{i}", tokens(n), np.zeros(n, np.float32), (rng.random(n) > 0.2).astype(np.uint8), ((0, n),), Finish.STOP)
            for i, n in enumerate(lengths)
        ]
        out.append(Group(f"g{g}", Prompt(f"g{g}", tokens(prompt), "math", ("1",)), tuple(samples)))
    return out


def of_transformers(folder: Path, asked: Sequence[Group]) -> dict[str, np.ndarray]:
    """The logit of every response token, each response alone; of two labels the difference."""
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(str(folder), dtype=torch.float32).eval()
    found = {}
    for group in asked:
        for sample in group.samples:
            ids = torch.from_numpy(np.concatenate([group.prompt.token_ids, sample.token_ids]).astype(np.int64))
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(group.prompt.token_ids) :]
            found[sample.sample_id] = (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).numpy()
    return found


def scored(
    at: Any, folder: Path, asked: list[Group], budget: int, sequence_parallel: bool, temperature: float = 1.0, **how: Any
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """What one rank answers."""
    from rlinf.workers.token_reward import TokenRewardWorker

    config = Config()
    config.cluster.device = "cpu"
    config.algorithm.dense_rewards, config.algorithm.sampling_params.temperature = True, temperature
    scorer = config.token_reward
    scorer.model_dir, scorer.model.precision, scorer.model.sequence_parallel = str(folder), "fp32", sequence_parallel
    scorer.model.tensor_model_parallel_size, scorer.model.pipeline_model_parallel_size = at.tp, at.pp
    for name, value in how.items():
        setattr(scorer, name, value)
    worker = TokenRewardWorker(WorkerAddress("token_reward", 0, 1, 0, (0,), "127.0.0.1", 0, "run", 1), config)
    assert not any(p.requires_grad for p in worker.engine.model.parameters()) and not hasattr(worker.engine, "optimizer")
    headers = [g.header() for g in asked]
    nothing = [np.zeros(len(g.samples)) for g in asked]
    share = build_rank_batches(headers, nothing, dp=at.dp, n_minibatches=1, max_tokens=budget, share_prefix=True)[at.dp_rank]
    report, rewards = worker.scores(share, *(next(g for g in asked if g.group_id == name) for name in share.group_ids))
    return report.scores, dict(rewards)


LAYOUTS = [
    (1, 1, 1, 1000, False),
    (1, 1, 1, 24, False),
    (3, 1, 1, 30, False),
    (4, 2, 2, 40, True),
    (2, 1, 2, 26, False),
]  # ranks, TP, PP, budget, SP


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_token_rewards_are_those_of_transformers_in_any_layout(
    rank_pool: Any, scorers: dict[int, Path], labels: int, layout: tuple[int, int, int, int, bool]
) -> None:
    ranks, tp, pp, budget, sequence_parallel = layout
    asked, expected = groups(), of_transformers(scorers[labels], groups())
    answers = rank_pool.run(scored, scorers[labels], asked, budget, sequence_parallel, ranks=ranks, tp=tp, pp=pp)
    assert sorted(name for _, tokens in answers for name in tokens) == sorted(expected)  # each response from one rank
    of_response = {name: value for answer, _ in answers for name, value in answer.items()}
    counts = {s.sample_id: s.loss_mask.astype(bool) for g in asked for s in g.samples}
    for _, tokens in answers:
        for name, rewards in tokens.items():
            assert np.abs(rewards - expected[name]).max() < 1e-5
            mean = expected[name][counts[name]].mean() if counts[name].any() else 0.0
            assert of_response[name] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_teacher_says_how_much_likelier_it_finds_each_token(
    rank_pool: Any, tmp_path_factory: pytest.TempPathFactory, layout: tuple[int, int, int, int, bool]
) -> None:
    """log p - log mu at the temperature of sampling, in any layout; 0 where the policy did not sample."""
    from transformers import AutoModelForCausalLM

    ranks, tp, pp, budget, sequence_parallel = layout
    folder = write_tiny_model(tmp_path_factory.mktemp("teacher") / "model", "llama", seed=5)
    rng, asked = np.random.default_rng(1), groups()
    rolled = lambda s: np.where(s.loss_mask > 0, -rng.random(len(s)), np.nan).astype(np.float32)
    asked = [replace(g, samples=tuple(replace(s, rollout_logprobs=rolled(s)) for s in g.samples)) for g in asked]
    model, expected = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval(), {}
    for g in asked:
        for s in g.samples:
            ids = torch.from_numpy(np.concatenate([g.prompt.token_ids, s.token_ids]).astype(np.int64))
            with torch.no_grad():
                logprobs = (model(ids[None]).logits[0, len(g.prompt.token_ids) - 1 : -1] / 0.7).log_softmax(-1)
            p = logprobs.gather(1, ids[len(g.prompt.token_ids) :, None])[:, 0].numpy()
            expected[s.sample_id] = np.where(s.loss_mask > 0, p - s.rollout_logprobs, 0)
    how = {"output": "teacher", "weight": 2.0}
    answers = rank_pool.run(taught, folder, asked, budget, sequence_parallel, how, ranks=ranks, tp=tp, pp=pp)
    assert sorted(name for _, tokens in answers for name in tokens) == sorted(expected)
    of_response = {name: value for answer, _ in answers for name, value in answer.items()}
    for name, rewards in ((n, r) for _, tokens in answers for n, r in tokens.items()):
        assert np.abs(rewards - 2 * expected[name]).max() < 1e-5
        (counted,) = [s.loss_mask > 0 for g in asked for s in g.samples if s.sample_id == name]
        assert of_response[name] == pytest.approx(expected[name][counted].mean() if counted.any() else 0.0, abs=1e-5)


def taught(at: Any, folder: Path, asked: list[Group], budget: int, sequence_parallel: bool, how: dict[str, Any]) -> Any:
    return scored(at, folder, asked, budget, sequence_parallel, temperature=0.7, **how)


def test_probability_weight_and_reduce(rank_pool: Any, scorers: dict[int, Path]) -> None:
    """Of two labels the sigmoid of the difference is the probability of the second; the weight is for what is paid,
    not for what is reported."""
    asked, logits = groups(), of_transformers(scorers[2], groups())
    how = {"output": "probability", "reduce": "min", "weight": 3.0}
    ((of_response, tokens),) = rank_pool.run(scored_with, scorers[2], asked, how, ranks=1)
    for g in asked:
        for s in g.samples:
            expected, counted = 1 / (1 + np.exp(-logits[s.sample_id])), s.loss_mask.astype(bool)
            assert tokens[s.sample_id] == pytest.approx(3 * expected, abs=1e-5)
            assert of_response[s.sample_id] == pytest.approx(expected[counted].min() if counted.any() else 0.0, abs=1e-5)


def scored_with(at: Any, folder: Path, asked: list[Group], how: dict[str, Any]) -> Any:
    return scored(at, folder, asked, 1000, False, **how)


def test_a_responses_score() -> None:
    scores = np.array([2.0, -1.0, 5.0])
    assert [response_score(scores, how) for how in ("mean", "sum", "last", "min")] == [2.0, 6.0, 5.0, -1.0]
    assert all(response_score(scores[:0], how) == 0.0 for how in ("mean", "sum", "last", "min"))


def test_the_token_that_is_read_behind_the_end_is_not_counted() -> None:
    longer = read_to_the_end(groups()[0])
    for before, after in zip(groups()[0].samples, longer.samples):
        assert len(after) == len(before) + 1 and (after.token_ids[:-1] == before.token_ids).all()
        assert after.loss_mask[-1] == 0 and math.isnan(after.rollout_logprobs[-1]) and replace(after, sample_id="x")


def test_heads_that_score_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="no score.weight"):
        with_scoring_head({"lm_head.weight": torch.ones(9, 4)}, 4)
    for shape in ((3, 4), (1, 5)):
        with pytest.raises(UserError, match="one label or two"):
            with_scoring_head({"score.weight": torch.ones(shape)}, 4)
    tensors, bias = with_scoring_head({"score.weight": torch.tensor([[1.0, 2.0], [4.0, 8.0]]), "score.bias": torch.tensor([0.5, 2.0])}, 2)
    assert tensors["score.weight"].tolist() == [[3.0, 6.0]] and bias == 1.5
