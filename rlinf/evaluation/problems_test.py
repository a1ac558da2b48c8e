"""Prompts as the model sees them: one BOS, one open think tag, the question and its instruction once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rlinf.config.benchmarks import BENCHMARKS
from rlinf.config.load import load
from rlinf.config.schema import Config
from rlinf.data.prompts import problems_fingerprint
from rlinf.data.tokenizer import TextTokenizer
from rlinf.errors import UserError
from rlinf.evaluation.problems import check_context, load_sets

MARKERS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
R1_CHAT = (
    "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def r1() -> TextTokenizer:
    """A tokenizer with the markers, the BOS and the chat template of DeepSeek-R1's distilled models."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(MARKERS)
    settings = {"bos_token": MARKERS[0], "eos_token": MARKERS[1], "add_bos_token": True, "chat_template": R1_CHAT}
    return TextTokenizer(backend, settings, (257,))


def config_of(folder: Path, section: str, **settings: object) -> Config:
    rows = [{"prompt": f"How much is {i}?", "task": "math", "query_id": str(i), "solutions": [f"\\boxed{{{i}}}"]} for i in range(3)]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"evaluation.{section}.{k}={v}" for k, v in {"path": folder / "set.jsonl", **settings}.items()]
    return load(None, ["rollout.model_dir=none", *words]).config


@pytest.mark.parametrize("template", ["chat", "r1"])
@pytest.mark.parametrize("section", ["aime24", "gpqa_diamond"])
def test_the_published_prompt_of_reasoning_models(tmp_path: Path, r1: TextTokenizer, template: str, section: str) -> None:
    (problems,) = load_sets(config_of(tmp_path, section, template=template), r1)
    bos, user, assistant, think = (r1.encode(m)[-1] for m in (MARKERS[0], MARKERS[2], MARKERS[3], MARKERS[4]))
    for i, prompt in enumerate(problems.prompts):
        ids = prompt.token_ids.tolist()
        assert ids[0] == bos and [ids.count(x) for x in (bos, user, assistant, think)] == [1, 1, 1, 1]
        instruction = problems.protocol.instruction
        assert prompt.text.removeprefix(MARKERS[0]) == f"<｜User｜>How much is {i}?\n{instruction}<｜Assistant｜><think>\n"
        assert prompt.solutions == (f"\\boxed{{{i}}}",) and prompt.prompt_id == str(i)


def test_raw_prompts_and_empty_instructions_are_left_as_they_are(tmp_path: Path, r1: TextTokenizer) -> None:
    (raw,) = load_sets(config_of(tmp_path, "custom"), r1)
    assert raw.name == "set" and raw.prompts[1].text == "How much is 1?"
    (bare,) = load_sets(config_of(tmp_path, "math500", template="r1", instruction="''"), r1)
    assert bare.prompts[1].text == "<｜User｜>How much is 1?<｜Assistant｜><think>\n"


def test_samples_are_asked_for_in_shares_whatever_the_number_of_engines(tmp_path: Path, r1: TextTokenizer) -> None:
    (problems,) = load_sets(config_of(tmp_path, "aime24", n=20), r1)
    units = problems.units()
    assert [(u.first, u.count) for u in units[:3]] == [(0, 8), (8, 8), (16, 4)]
    assert len({u.group_id for u in units}) == 9 and sum(u.count for u in units) == 60


def test_the_fingerprint_knows_question_gold_and_template(tmp_path: Path, r1: TextTokenizer) -> None:
    prints = []
    for template in ("chat", "raw"):
        (problems,) = load_sets(config_of(tmp_path, "aime24", template=template), r1)
        prints.append(problems_fingerprint(problems.prompts))
    text = (tmp_path / "set.jsonl").read_text()
    config = config_of(tmp_path, "aime24")
    (tmp_path / "set.jsonl").write_text(text.replace("boxed{2}", "boxed{3}"))
    prints.append(problems_fingerprint(load_sets(config, r1)[0].prompts))
    assert len(set(prints)) == 3


def test_what_training_data_may_lack_no_benchmark_may(tmp_path: Path, r1: TextTokenizer) -> None:
    config = config_of(tmp_path, "aime24")
    config.data.on_bad_record, config.data.prompt_key = "skip", "question"
    assert len(load_sets(config, r1)[0].prompts) == 3
    with (tmp_path / "set.jsonl").open("a") as file:
        file.write('{"prompt": "p", "task": "math", "solutions": []}\n')
    with pytest.raises(UserError, match="set.jsonl.*line 4|line 4"):
        load_sets(config, r1)


def test_the_context_is_that_of_the_longest_answer(tmp_path: Path, r1: TextTokenizer) -> None:
    sets = load_sets(config_of(tmp_path, "aime24", max_tokens=100), r1)
    longest = max(len(p.token_ids) for p in sets[0].prompts)
    assert check_context(sets, longest + 100, "m") == longest + 100
    with pytest.raises(UserError, match=f"lower it to at most {longest + 1}"[:-1]):
        check_context(sets, longest + 99, "m")


def test_the_defaults_are_the_published_protocols() -> None:
    e = load(None, ["rollout.model_dir=none"]).config.evaluation
    for name, expected in {
        "aime24": (32, 0.6, 0.95, 32768), "aime25": (32, 0.6, 0.95, 32768), "gpqa_diamond": (32, 0.6, 0.95, 32768),
        "math500": (4, 0.6, 0.95, 32768), "gsm8k": (1, 0.0, 1.0, 2048), "custom": (1, 0.0, 1.0, 2048),
    }.items():  # fmt: skip
        b = getattr(e, name)
        assert (b.n, b.temperature, b.top_p, b.max_tokens) == expected and b.path is None
    assert set(BENCHMARKS) == {name for name in vars(e) if name not in ("output_dir", "opencompass_dir")}


def test_a_custom_set_has_the_fields_of_section_data_and_a_benchmark_has_its_own(
    tmp_path: Path, r1: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": ""}\n')
    words = ["data.prompt_key=question", "data.answer_key=answer", f"evaluation.custom.path={tmp_path / 'own.jsonl'}"]
    with pytest.raises(UserError, match="or set data.on_bad_record: skip"):
        load_sets(load(None, ["rollout.model_dir=none", *words]).config, r1)
    (own,) = load_sets(load(None, ["rollout.model_dir=none", *words, "data.on_bad_record=skip"]).config, r1)
    assert [(p.text, p.solutions) for p in own.prompts] == [("1+1?", ("2",))]
    assert capsys.readouterr().err == "own: 1 of 2 prompts (math 1; longest 5 tokens); bad records skipped: 1\n"
    with pytest.raises(UserError, match="no field `prompt`"):
        load_sets(load(None, ["rollout.model_dir=none", *words[:2], f"evaluation.aime24.path={tmp_path / 'own.jsonl'}"]).config, r1)
