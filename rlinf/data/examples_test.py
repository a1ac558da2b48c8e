"""Examples from JSONL: what is trained on, and every way in which a line can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlinf.config.schema import Config
from rlinf.data.arithmetic import generate
from rlinf.data.examples import load_examples, repeated
from rlinf.data.tokenizer import TextTokenizer, load_tokenizer
from rlinf.data.tokenizer_test import TEMPLATE, make_folder
from rlinf.errors import UserError

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(str(make_folder(tmp_path_factory.mktemp("model"), add_bos_token=True, chat_template=TEMPLATE)))


def config(**changes: Any) -> Config:
    """changes: section__key=value."""
    made = Config()
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(made, section), key, value)
    return made


def write(folder: Path, *rows: Any) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_prompt_and_response_are_what_the_model_will_see_and_give(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (one,), report = load_examples([write(tmp_path, {"prompt": "1+1=", "response": "2"})], config(), tokenizer)
    assert one.prompt.token_ids.tolist() == tokenizer.encode("1+1=") and one.prompt.token_ids[0] == BOS
    assert one.samples[0].token_ids.tolist() == [*tokenizer.encode("2")[1:], EOS]  # no BOS inside, one end token
    assert one.samples[0].loss_mask.tolist() == [1, 1] and one.group_id == "data.jsonl:1"
    assert (report.read, report.kept, report.response_tokens, report.longest) == (1, 1, 2, 7)
    assert report.describe() == "1 of 1 examples (2 response tokens; longest 7 tokens)"


def test_the_end_token_is_there_once_or_not_at_all(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, {"prompt": "a", "response": "b</s>"}, {"prompt": "a", "response": "b"})
    ends = [g.samples[0].token_ids.tolist().count(EOS) for g in load_examples([path], config(), tokenizer)[0]]
    without = [g.samples[0].token_ids.tolist().count(EOS) for g in load_examples([path], config(sft__append_end_token=False), tokenizer)[0]]
    assert (ends, without) == ([1, 1], [1, 0])


def test_a_chat_is_trained_on_its_last_turn(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    path = write(tmp_path, {"messages": chat}, {"messages": chat[:2], "response": "3"})
    examples, _ = load_examples([path], config(data__prompt_key="messages", data__apply_chat_template=True), tokenizer)
    assert [g.prompt.token_ids.tolist() for g in examples] == [tokenizer.encode(tokenizer.render_chat(chat[:2]))] * 2
    assert [tokenizer.decode(g.samples[0].token_ids.tolist()) for g in examples] == ["2", "3"]


def test_a_text_prompt_becomes_the_users_turn(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (one,), _ = load_examples([write(tmp_path, {"prompt": "1+1", "response": "2"})], config(data__apply_chat_template=True), tokenizer)
    assert one.prompt.token_ids.tolist() == tokenizer.encode("<user>1+1\n<assistant>")


def test_field_names_come_from_the_configuration(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, {"question": "1+1=", "answer": "2", "query_id": 7})
    (one,), _ = load_examples([path], config(data__prompt_key="question", sft__response_key="answer"), tokenizer)
    assert one.group_id == "7" and tokenizer.decode(one.samples[0].token_ids.tolist()) == "2"


def test_an_example_of_exactly_the_limit_stays(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, {"prompt": "x" * 9, "response": "y" * 4}, {"prompt": "x", "response": "y"})  # 1 + 9 + 4 + 1 tokens
    assert load_examples([path], config(runner__seq_length=15), tokenizer)[1].kept == 2
    _, report = load_examples([path], config(runner__seq_length=14), tokenizer)
    assert (report.kept, report.too_long) == (1, 1) and "longer than runner.seq_length dropped: 1" in report.describe()
    with pytest.raises(UserError, match="data.jsonl, line 1: 15 tokens, runner.seq_length is 14"):
        load_examples([path], config(runner__seq_length=14, data__filter_prompt_by_length=False), tokenizer)


CHAT = {"data__apply_chat_template": True}
BAD = [
    ("{", {}, "not JSON ("),
    ({"response": "2"}, {}, "no field `prompt` (data.prompt_key)"),
    ({"prompt": "1"}, {}, "no field `response` (sft.response_key)"),
    ({"prompt": "1", "response": " "}, {}, "`response` is not a text, or is empty"),
    ({"prompt": "1", "response": ["2"]}, {}, "`response` is not a text, or is empty"),
    ({"prompt": "", "response": "2"}, {}, "`prompt` is empty"),
    ({"prompt": [{"role": "user", "content": "x"}], "response": "2"}, {}, "needs data.apply_chat_template: true"),
    ({"prompt": [{"role": "assistant", "content": "x"}]}, CHAT, "holds an assistant's turn alone"),
    ({"prompt": [{"role": "user", "content": "x"}]}, CHAT, "no field `response`"),
]


@pytest.mark.parametrize(("line", "changes", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_or_skipped_and_counted(
    tmp_path: Path, tokenizer: TextTokenizer, line: Any, changes: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "response": "2"}, line)
    with pytest.raises(UserError) as error:
        load_examples([path], config(**changes), tokenizer)
    assert f"{path}, line 2: " in str(error.value) and reason in str(error.value)
    _, report = load_examples([path], config(data__on_bad_record="skip", **changes), tokenizer)
    assert (report.read, report.kept, report.bad_records) == (2, 1, 1) and "bad records skipped: 1" in report.describe()


def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="no example is left"):
        load_examples([write(tmp_path, "{")], config(data__on_bad_record="skip"), tokenizer)


def test_the_fingerprint_tells_data_apart(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    variants = [{"prompt": "12", "response": "3"}, {"prompt": "1", "response": "23"}, {"prompt": "12", "response": "4"}]
    prints = {load_examples([write(tmp_path, row)], config(), tokenizer)[1].fingerprint for row in variants}
    assert len(prints) == len(variants)


def test_the_arithmetic_files_are_examples_too(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    paths = generate(tmp_path, 20, 5, seed=0)
    examples, report = load_examples([str(p) for p in paths.values()], config(), tokenizer)
    assert report.kept == 25
    for group in examples:
        prompt, response = (tokenizer.decode(ids.tolist()) for ids in (group.prompt.token_ids, group.samples[0].token_ids))
        a, b = (int(x) for x in prompt.rsplit("A: ", 1)[1].rstrip("=").split("+"))
        assert response == f"{a + b}, \\boxed{{{a + b}}}"


def test_held_out_examples_that_are_trained_on_are_counted_by_prompt_and_response(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [{"prompt": "1+1=", "response": str(i)} for i in range(4)]
    examples, _ = load_examples([write(tmp_path, *rows)], config(), tokenizer)
    assert (repeated(examples[:3], examples[2:]) or "").startswith("warning: 1 of 2 examples of data.val_data_paths are in data.train")
    assert repeated(examples[:2], examples[2:]) is None
