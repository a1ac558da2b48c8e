"""AReaL-boba files as they come: the quirks of the format, and every way in which a file can be wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlinf.config.schema import DataConfig
from rlinf.data.prompts import load_prompts, repeated, short_names
from rlinf.data.tokenizer import TextTokenizer, load_tokenizer
from rlinf.data.tokenizer_test import TEMPLATE, make_folder
from rlinf.errors import UserError

R1_PROMPT = "<｜User｜>Compute 1/3 - 1.\nPlease reason step by step, and put your final answer within \\boxed{}.<｜Assistant｜><think>\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(str(make_folder(tmp_path_factory.mktemp("model"), add_bos_token=True, chat_template=TEMPLATE)))


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "1+1=", "task": "math", "query_id": "q", "solutions": ["\\boxed{2}"]} | changes


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    """Dicts as JSON, strings as they are, one a line."""
    text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_boba_record_is_taken_as_it_stands(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, row(prompt=R1_PROMPT, query_id=123, solutions=["\\boxed{-2/3}", "so \\boxed{e}"], metadata={"level": [3]}))
    (prompt,), report = load_prompts([path], DataConfig(), tokenizer)
    assert (prompt.prompt_id, prompt.task, prompt.solutions, prompt.text) == ("123", "math", ("\\boxed{-2/3}", "so \\boxed{e}"), R1_PROMPT)
    assert (prompt.source, prompt.metadata) == ("data", {"level": [3]})
    assert prompt.token_ids.dtype == "int32"
    assert prompt.token_ids.tolist() == tokenizer.encode(R1_PROMPT) and prompt.token_ids.tolist().count(256) == 1
    assert (report.read, report.kept, report.tasks, report.longest_prompt) == (1, 1, {"math": 1}, len(prompt.token_ids))


def test_a_prompt_knows_its_file_by_a_short_name(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "b").mkdir()
    files = [
        write(tmp_path, row(), name="aime24.jsonl"),
        write(tmp_path / "b", row(), row(), name="aime24.jsonl"),
        write(tmp_path, row(), name="math.x.jsonl"),
    ]
    prompts, _ = load_prompts(files, DataConfig(), tokenizer)
    assert [p.source for p in prompts] == ["aime24", "aime24-2", "aime24-2", "math.x"]
    assert short_names(["a/x", "b/x", "c/x-2", "a/x", "d/x"]) == {"a/x": "x", "b/x": "x-2", "c/x-2": "x-2-2", "d/x": "x-3"}
    assert short_names(["a/my file.jsonl", "b/my_file.jsonl", "\udcff.jsonl"]) == {
        "a/my file.jsonl": "my_file", "b/my_file.jsonl": "my_file-2", "\udcff.jsonl": "_",
    }  # fmt: skip


def test_missing_task_is_math_and_missing_id_is_the_place(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, "", {"prompt": "1+1=", "solutions": "2"})
    (prompt,), _ = load_prompts([path], DataConfig(), tokenizer)
    assert (prompt.task, prompt.prompt_id, prompt.solutions) == ("math", "data.jsonl:2", ("2",))


def test_field_names_come_from_the_configuration(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, {"question": "1+1=", "answer": "2"})
    (prompt,), _ = load_prompts([path], DataConfig(prompt_key="question", answer_key="answer"), tokenizer)
    assert (prompt.text, prompt.solutions) == ("1+1=", ("2",))


def test_line_separators_inside_a_string_do_not_split_the_line(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, row(prompt="a\u2028b\u0085c\x1cd"))
    (prompt,), report = load_prompts([path], DataConfig(), tokenizer)
    assert prompt.text == "a\u2028b\u0085c\x1cd" and report.read == 1


def test_crlf_and_a_byte_order_mark_are_harmless(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r\n" + json.dumps(row(query_id="r")).encode())
    prompts, _ = load_prompts([str(tmp_path / "data.jsonl")], DataConfig(), tokenizer)
    assert [p.prompt_id for p in prompts] == ["q", "r"]


def test_duplicate_ids_become_unique_and_stay_so_whatever_is_filtered(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [row(), row(task="code"), row(query_id="q@idx:3"), row(), row(query_id="r")]
    a, b = write(tmp_path, *rows, name="a.jsonl"), write(tmp_path, row(), name="b.jsonl")
    prompts, report = load_prompts([a, b], DataConfig(), tokenizer)
    assert [p.prompt_id for p in prompts] == ["q", "q@idx:1", "q@idx:3", "q@idx:3'", "r", "q@idx:5"]
    assert report.duplicates_renamed == 3
    only_math, _ = load_prompts([a, b], DataConfig(tasks=["math"]), tokenizer)
    assert [p.prompt_id for p in only_math] == ["q", "q@idx:3", "q@idx:3'", "r", "q@idx:5"]


def test_tasks_and_length_filter_with_counts(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, row(), row(task="code"), row(task="stem"), row(task="code"), row(prompt="x" * 20))
    prompts, report = load_prompts([path], DataConfig(tasks=["math", "stem"], max_prompt_length=20), tokenizer)
    assert (report.read, report.kept, report.tasks) == (5, 2, {"math": 1, "stem": 1})
    assert (report.filtered_by_task, report.filtered_by_length, len(prompts)) == ({"code": 2}, 1, 2)
    assert "code 2" in report.describe() and "data.max_prompt_length dropped: 1" in report.describe()


def test_a_prompt_of_exactly_the_limit_stays(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, row(prompt="x" * 20))  # and the BOS
    assert load_prompts([path], DataConfig(max_prompt_length=21), tokenizer)[1].kept == 1
    with pytest.raises(UserError, match=r"data.jsonl, line 1: 21 tokens, data.max_prompt_length is 20"):
        load_prompts([path], DataConfig(max_prompt_length=20, filter_prompt_by_length=False), tokenizer)


def test_a_chat_that_the_template_does_not_take_is_named_with_its_line(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    refusing = load_tokenizer(str(make_folder(tmp_path, chat_template=template)))
    path = write(tmp_path, row(), row(prompt=[{"role": "system", "content": "Be brief."}], query_id="r"))
    with pytest.raises(UserError, match="line 2: the model's chat template refuses the chat: no system turn; fix the line"):
        load_prompts([path], DataConfig(apply_chat_template=True), refusing)


def test_chat_template_wraps_strings_and_message_lists(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    path = write(tmp_path, row(prompt="1+1?"), row(prompt=chat, query_id="r"))
    prompts, _ = load_prompts([path], DataConfig(apply_chat_template=True), tokenizer)
    assert [p.text for p in prompts] == ["<user>1+1?\n<assistant>", "<system>Be brief.\n<user>1+1?\n<assistant>"]
    assert prompts[1].token_ids.tolist() == tokenizer.encode(prompts[1].text)


BAD_LINES = {
    "{": "not JSON (",
    "7": "not a JSON object",
    '{"solutions": ["1"]}': "no field `prompt` (data.prompt_key); the line has: solutions",
    '{"prompt": "x"}': "no field `solutions` (data.answer_key); the line has: prompt",
    json.dumps(row(prompt=" \n")): "`prompt` is empty",
    json.dumps(row(prompt=3)): "`prompt` is neither a string nor a list of chat messages",
    json.dumps(row(prompt=[{"role": "user", "content": "x"}])): "needs data.apply_chat_template: true",
    json.dumps(row(solutions=[])): "`solutions` is an empty list",
    json.dumps(row(solutions=[42])): '`solutions` is not a list of strings but [42]; write ["42"]',
    json.dumps(row(solutions=2.5)): '`solutions` is not a list of strings but 2.5; write ["2.5"]',
    json.dumps(row(solutions=["1", 2])): '`solutions` is not a list of strings but ["1", 2]; write ["1", "2"]',
    json.dumps(row(solutions=None)): '`solutions` is not a list of strings but null; write the answers as text, such as ["2"]',
    json.dumps(row(solutions=[True])): "but [true]; write the answers as text",
    json.dumps(row(solutions=["1", ""])): "`solutions` holds an empty string",
    json.dumps(row(task=3)): "`task` is not a string",
    json.dumps(row(query_id=["q"])): "`query_id` is neither a string nor a number",
    json.dumps(row(prompt="\ud800")): "half a surrogate pair",
    '{"prompt": ' + "9" * 5000 + "}": "not readable (",
    "[" * 100_000: "not readable (",
    '{"prompt": "x", "solutions": ["1"], "prompt": "y"}': "not readable (the key `prompt` is there twice)",
}


@pytest.mark.parametrize("line, reason", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_with_its_fault_or_skipped_and_counted(
    tmp_path: Path, tokenizer: TextTokenizer, line: str, reason: str
) -> None:
    path = write(tmp_path, row(), line, row(query_id="r"))
    with pytest.raises(UserError) as error:
        load_prompts([path], DataConfig(), tokenizer)
    assert f"{path}, line 2: " in str(error.value) and reason in str(error.value) and "on_bad_record" in str(error.value)
    prompts, report = load_prompts([path], DataConfig(on_bad_record="skip"), tokenizer)
    assert ([p.prompt_id for p in prompts], report.read, report.bad_records) == (["q", "r"], 3, 1)
    assert "bad records skipped: 1" in report.describe()


def test_a_table_is_told_by_its_name_in_one_sentence(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "data.csv").write_text("prompt,solutions\n1+1=,2\n2+2=,4\n")
    with pytest.raises(
        UserError, match="data.csv: CSV, not JSONL; write one object a line, such as .*`rlinf data import` makes such a file"
    ):
        load_prompts([str(tmp_path / "data.csv")], DataConfig(), tokenizer)


def test_a_line_that_is_not_utf8(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 1: not UTF-8 \(byte 12\)"):
        load_prompts([str(tmp_path / "data.jsonl")], DataConfig(), tokenizer)


def test_at_most_twenty_bad_lines_are_listed(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path, *(["{"] * 23))
    with pytest.raises(UserError) as error:
        load_prompts([path], DataConfig(), tokenizer)
    assert str(error.value).count("not JSON") == 20 and "and 3 more" in str(error.value) and "23 data lines" in str(error.value)


@pytest.mark.parametrize("content, said", [
    (b"", "the file is empty"), (b"\n \n", "the file is empty"), (gzip.compress(b"{}", mtime=0), "gzip-compressed"),
    (b"PAR1xx", "a Parquet file"),
    (b"\x00\x01", "not a text file"), (b" [\n{}\n]", "a JSON array, not JSONL"),
])  # fmt: skip
def test_a_file_that_is_no_jsonl(tmp_path: Path, tokenizer: TextTokenizer, content: bytes, said: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_prompts([str(tmp_path / "data.jsonl")], DataConfig(on_bad_record="skip"), tokenizer)
    assert "data.jsonl" in str(error.value)


def test_missing_files_folders_and_nothing_left(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="nowhere.jsonl: no such data file"):
        load_prompts([str(tmp_path / "nowhere.jsonl")], DataConfig(), tokenizer)
    with pytest.raises(UserError, match="not a file"):
        load_prompts([str(tmp_path)], DataConfig(), tokenizer)
    for rows, data, why in (
        ([row()], DataConfig(tasks=["maths"]), "data.tasks names maths; the files hold math 1"),
        (
            [row(), row(prompt="1+1+1=")],
            DataConfig(max_prompt_length=2),
            r"raise data.max_prompt_length \(2\): the shortest prompt has 5 tokens",
        ),
        (["{"], DataConfig(on_bad_record="skip"), "none of the 1 lines can be used; set data.on_bad_record: error"),
    ):
        with pytest.raises(UserError, match=rf"data.jsonl: no prompt is left: {why}"):
            load_prompts([write(tmp_path, *rows)], data, tokenizer)


def test_the_fingerprint_tells_data_apart(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    variants = [[row()], [row(query_id="r")], [row(prompt="1+2=")], [row(), row(query_id="r")], [row(query_id="r"), row()]]
    prints = [load_prompts([write(tmp_path, *rows)], DataConfig(), tokenizer)[1].fingerprint for rows in variants]
    assert len(set(prints)) == len(prints)
    assert load_prompts([write(tmp_path, row())], DataConfig(), tokenizer)[1].fingerprint == prints[0]


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    train = write(tmp_path, *(row(prompt=f"{i} + 1 =", query_id=f"t{i}") for i in range(6)))
    val = write(tmp_path, *(row(prompt=f"{i} + 1 =", query_id=f"v{i}") for i in range(4, 9)), name="val.jsonl")
    training, held_out = (load_prompts([file], DataConfig(), tokenizer)[0] for file in (train, val))
    assert (repeated(training, held_out) or "").startswith(
        "warning: 2 of 5 prompts of data.val_data_paths are in data.train_data_paths too, the first is v4:"
    )
    assert repeated(training[:4], held_out) is None and repeated(training, []) is None
