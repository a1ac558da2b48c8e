"""The tokenizer: one BOS where the model has one, every end token, and errors that name the file."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from rlinf.config.schema import Config
from rlinf.data.tokenizer import BadChat, load_tokenizer, tokenizer_of
from rlinf.errors import UserError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TEXTS = ["Question: What is 23+45?\nAnswer:", "héllo 日本 🙂 \\boxed{1}", "<s>already begun", "", "a<s>b</s>"]


def make_folder(folder: Path, *, post_processor_adds_bos: bool = False, files: dict[str, dict] | None = None, **settings: Any) -> Path:
    """A byte-level tokenizer: 256 bytes, then <s> = 256 and </s> = 257."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if post_processor_adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | settings
    for name, content in ({"tokenizer_config.json": config} | (files or {})).items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("flag, expected", [(None, None), (False, False), (True, True)])
def test_exactly_one_bos_where_the_model_adds_one(tmp_path: Path, in_file: bool, flag: bool | None, expected: bool | None) -> None:
    settings = {} if flag is None else {"add_bos_token": flag}
    tokenizer = load_tokenizer(str(make_folder(tmp_path, post_processor_adds_bos=in_file, **settings)))
    adds = in_file if expected is None else expected
    assert tokenizer.encode("ab").count(256) == adds
    assert tokenizer.encode("<s>ab").count(256) == 1
    assert tokenizer.encode_batch(["ab", "<s>ab"])[adds] == tokenizer.encode("<s>ab" if adds else "ab")


def test_a_bos_written_as_an_object_counts_too(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, add_bos_token=True, bos_token={"content": "<s>", "lstrip": False})
    assert load_tokenizer(str(folder)).encode("a")[0] == 256


def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_folder(tmp_path, post_processor_adds_bos=True)
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        begun = text.startswith("<s>")
        assert ours.encode(text) == theirs(text, add_special_tokens=not begun).input_ids


def test_decode_gives_the_text_back_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_folder(tmp_path, add_bos_token=True)))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<s>", "").replace("</s>", "")


def test_pieces_of_tokens_join_to_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_folder(tmp_path)))
    ids = tokenizer.encode("añ≤😀 b")  # a byte a token
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids) == "añ≤😀 b"
    assert pieces[:6] == ["a", "", "ñ", "", "", "≤"]
    broken = ids[:7]  # ends within a character
    assert "".join(tokenizer.pieces(broken)) == tokenizer.decode(broken)
    assert tokenizer.pieces([]) == []


def test_pieces_join_whatever_the_bytes_and_take_no_time_that_grows_with_the_square(tmp_path: Path) -> None:
    tokenizer, rng = load_tokenizer(str(make_folder(tmp_path))), random.Random(0)
    whole, broken = tokenizer.encode("数学😀é x"), tokenizer.encode("😀数")
    for _ in range(300):
        ids = [rng.choice(rng.choice([whole, broken[:3], [257], range(258)])) for _ in range(rng.randrange(90))]
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    decoded: list[int] = []
    tokenizer.decode = lambda ids, decode=tokenizer.decode: decoded.append(len(ids)) or decode(ids)  # type: ignore[method-assign]
    for token in (broken[1], 257):
        assert len(tokenizer.pieces([token] * 2000)) == 2000
    assert max(decoded) < 40


def test_end_tokens_are_the_union_of_the_three_files(tmp_path: Path) -> None:
    files = {"generation_config.json": {"eos_token_id": [7, 257]}, "config.json": {"eos_token_id": 9}}
    tokenizer = load_tokenizer(str(make_folder(tmp_path, files=files)))
    assert tokenizer.eos_token_ids == (7, 257, 9) and tokenizer.end_token_id == 257  # the tokenizer's own ends what is learned


@pytest.mark.parametrize(("ids", "shown"), [({"a": 1}, '{"a": 1}'), ("</s>", '"</s>"'), ([7, "x"], '7, "x"'), (True, "true")])
def test_an_end_token_that_is_no_number_is_told_by_file_and_key(tmp_path: Path, ids: object, shown: str) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}.*/config.json: eos_token_id is {shown}, no token's number"):
        load_tokenizer(str(make_folder(tmp_path, files={"config.json": {"eos_token_id": ids}})))


def test_without_an_own_end_token_the_first_of_the_model_ends_what_is_learned(tmp_path: Path) -> None:
    files = {"generation_config.json": {"eos_token_id": [7, 9]}}
    assert load_tokenizer(str(make_folder(tmp_path, eos_token=None, files=files))).end_token_id == 7


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(str(make_folder(tmp_path, eos_token=None)))


@pytest.mark.parametrize("where", ["file", "settings", "named"])
def test_chat_template_is_found_wherever_it_stands(tmp_path: Path, where: str) -> None:
    given = {"file": {}, "settings": {"chat_template": TEMPLATE}, "named": {"chat_template": [{"name": "default", "template": TEMPLATE}]}}[
        where
    ]
    folder = make_folder(tmp_path, **given)
    if where == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(str(folder))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert tokenizer.render_chat(chat) == "<system>Be brief.\n<user>1+1?\n<assistant>"


THINKS = TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}{{ eos_token and style }}"


def test_variables_reach_the_chat_template_as_values(tmp_path: Path) -> None:
    folder, chat = str(make_folder(tmp_path, chat_template=THINKS)), [{"role": "user", "content": "1+1?"}]
    plain, quiet = (
        load_tokenizer(folder, variables=given).render_chat(chat) for given in ({}, {"enable_thinking": "false", "style": "dry"})
    )
    assert plain == "<user>1+1?\n<assistant>" and quiet == plain + "<think></think>dry"


def test_the_tokenizer_of_a_run_has_its_variables_also_over_another_folder(tmp_path: Path) -> None:
    folder, config = str(make_folder(tmp_path, chat_template=THINKS)), Config()
    config.rollout.model_dir, config.data.chat_template_variables = folder, {"enable_thinking": "false", "style": "dry"}
    rendered = tokenizer_of(config).render_chat([{"role": "user", "content": "1+1?"}])
    assert rendered == "<user>1+1?\n<assistant><think></think>dry"
    config.rollout.model_dir = "/nowhere"
    assert tokenizer_of(config, folder).render_chat([{"role": "user", "content": "1+1?"}]) == rendered


@pytest.mark.parametrize(
    ("name", "template", "known"),
    [("enable_thinkin", THINKS, "enable_thinking, style"), ("messages", THINKS, "enable"), ("x", None, "none")],
)
def test_a_variable_that_the_template_does_not_read_is_named(tmp_path: Path, name: str, template: str | None, known: str) -> None:
    folder = make_folder(tmp_path, **({"chat_template": template} if template else {}))
    with pytest.raises(UserError, match=f"data.chat_template_variables: .* reads no variable {name}; it reads {known}"):
        load_tokenizer(str(folder), variables={name: "1"})


def test_a_missing_chat_template_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(make_folder(tmp_path))).render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("template", ["{{ raise_exception('no system turn, please') }}", "{% for %}", "{{ messages[0].x.y }}"])
def test_a_template_that_does_not_take_a_chat_is_told(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(str(make_folder(tmp_path, chat_template=template, auto_map=None)))
    with pytest.raises(BadChat, match="the model's chat template refuses the chat: ."):
        tokenizer.render_chat([{"role": "system", "content": "Be brief."}])


def test_folder_or_tokenizer_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: not a readable tokenizer"):
        load_tokenizer(str(tmp_path))
    make_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: not valid JSON"):
        load_tokenizer(str(tmp_path))


def test_code_of_the_folder_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}))
    (tmp_path / "own.py").write_text("raise RuntimeError('the code of the folder ran')")
    with pytest.raises(UserError, match="trust_remote_code: true"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)
    with pytest.raises(RuntimeError, match="the code of the folder ran"):
        load_tokenizer(str(tmp_path), trust_remote_code=True)


def test_loading_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = f"import sys; from rlinf.data.tokenizer import load_tokenizer; load_tokenizer({str(make_folder(tmp_path))!r}).encode('a'); " \
           "print([m for m in ('torch', 'transformers') if m in sys.modules])"  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout.strip() == "[]"
