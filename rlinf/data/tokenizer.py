"""The tokenizer of a model folder, read from tokenizer.json.

Only the `tokenizers` library is used, whose import takes 0.02 s. transformers, which imports torch (3 s), is needed only for chat templates
and for folders without tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from rlinf.config.schema import Config
from rlinf.config.settings import read_texts
from rlinf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VARIABLES = "data.chat_template_variables"
NOT_THE_USERS = {  # names in a template that Jinja, transformers or the chat itself defines
    "messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token", "pad_token", "unk_token", "raise_exception",
    "strftime_now", "namespace", "range", "dict", "loop", "cycler", "joiner", "lipsum",
}  # fmt: skip
ENCODE_AT_ONCE = 1024  # texts; until its ids are taken out, an encoding holds some hundred bytes for each token

# for pieces(), which decodes tokens whose bytes may be parts of a character
UNSURE = 3  # an incomplete character has at most so many bytes: so many U+FFFD at the end may still become a character
KEPT = 3 * UNSURE  # tokens of context that hold at least as many U+FFFD at their end
MOST_PENDING = 2 * KEPT  # after so many tokens without a complete character the bytes are taken to be broken

Message = Mapping[str, str]
"""One turn of a chat: {"role": ..., "content": ...}."""


class BadChat(UserError):
    """A chat that the model's chat template refuses."""


class TextTokenizer:
    """Text <-> token ids. An encoded text begins with exactly one BOS if the model's tokenizer adds one, otherwise with none.

    eos_token_ids: every token that generation_config.json, config.json or the tokenizer names as an end token, in that order (SGLang also
    takes all of them).
    """

    def __init__(
        self, backend: Tokenizer, settings: dict[str, Any], eos_token_ids: tuple[int, ...], variables: Mapping[str, Any] | None = None
    ) -> None:
        self._backend = backend
        self._variables = variables or {}
        _check_variables(settings.get("chat_template"), self._variables)
        self._settings = settings
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = _bos_that_is_added(backend, settings)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True) -> list[list[int]]:
        """Encode many texts, on all cores. bos=False: for texts that continue another one."""
        encoded: list[list[int]] = []
        for start in range(0, len(texts), ENCODE_AT_ONCE):
            chunk = list(texts[start : start + ENCODE_AT_ONCE])
            encoded += [e.ids for e in self._backend.encode_batch_fast(chunk, add_special_tokens=False)]
        if self.bos_token_id is None or not bos:
            return encoded
        return [ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids] for ids in encoded]

    @property
    def end_token_id(self) -> int:
        """The token that ends a response in training data: the tokenizer's own end token, with which chat templates end a turn.

        It need not be the first of eos_token_ids, which may come from another file.
        """
        own = _content(self._settings.get("eos_token"))
        found = None if own is None else self._backend.token_to_id(own)
        return self.eos_token_ids[0] if found is None else found

    @property
    def has_chat_template(self) -> bool:
        return bool(self._settings.get("chat_template"))

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The chat as text that ends where the assistant's turn begins. Raises UserError when the model has no chat template, and BadChat
        when the template refuses the chat."""
        if not self.has_chat_template:
            raise UserError(
                "data.apply_chat_template is true, but the model folder has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): set it to false and put finished prompts into the data file"
            )
        from jinja2.exceptions import TemplateError

        try:  # transformers takes any mapping, and gives text where it does not tokenize; it declares less
            return self._for_chat.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **self._variables)  # type: ignore[arg-type, return-value]
        except TemplateError as error:  # it does not know some role or order of turns, or is no template
            raise BadChat(f"the model's chat template refuses the chat: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; "" where a character is not complete yet. Joined, the pieces are decode(ids)."""
        pieces: list[str] = []
        context: list[int] = []  # the last tokens whose text is in `pieces`, since a text without what precedes it may decode differently
        pending: list[int] = []  # tokens after them, whose text is not in `pieces` yet
        told = 0  # how many characters of decode(context + pending) are in `pieces`
        for i, token in enumerate(ids):
            if token not in self._silent:
                pending.append(token)
            text = self.decode(context + pending)
            whole = i + 1 == len(ids) or not text.endswith("\ufffd")
            end = len(text) if whole else told
            if not whole and len(pending) > MOST_PENDING:  # broken bytes will not become characters; only the last ones still may
                end = max(told, len(text) - min(UNSURE, len(text) - len(text.rstrip("\ufffd"))))
            pieces.append(text[told:end])
            if end > told:
                held = len(text) - end
                context, pending = pending if whole else (context + pending)[-KEPT:], []
                told = len(self.decode(context)) - held
        return pieces

    @cached_property
    def _silent(self) -> frozenset[int]:
        """Tokens that decode() leaves out."""
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def chat_markers(self) -> list[str]:
        """The special tokens that the chat template contains; empty when there is no template."""
        template = self._settings.get("chat_template") or ""
        return sorted(token.content for token in self._backend.get_added_tokens_decoder().values() if token.content in template)

    @cached_property
    def _for_chat(self) -> PreTrainedTokenizerFast:
        from transformers import PreTrainedTokenizerFast

        names = {k: _content(self._settings.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        given = {k: v for k, v in names.items() if v is not None}
        return PreTrainedTokenizerFast(tokenizer_object=self._backend, chat_template=self._settings["chat_template"], **given)


def tokenizer_of(config: Config, model_dir: str | None = None) -> TextTokenizer:
    """The tokenizer of a run, with the settings of its configuration. model_dir: None = rollout.model_dir."""
    return load_tokenizer(model_dir or config.rollout.model_dir, config.rollout.trust_remote_code, config.data.chat_template_variables)


def load_tokenizer(model_dir: str, trust_remote_code: bool = False, variables: Mapping[str, str] | None = None) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder. variables: data.chat_template_variables.

    Code from the folder runs only when trust_remote_code is true and tokenizer_config.json names it. Raises UserError when the
    folder or its tokenizer is missing or cannot be read.
    """
    folder = Path(model_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"rollout.model_dir: {folder} is not a folder; give the path of a local Hugging Face model folder")
    settings = _read_json(folder / "tokenizer_config.json")
    backend = _backend_of(folder, settings, trust_remote_code)
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    given = read_texts(variables or {}, VARIABLES)
    return TextTokenizer(backend, _with_named_template(settings), _eos_token_ids(folder, backend, settings), given)


def token_unknown_to(other_dir: str, model_dir: str, trust_remote_code: bool = False) -> tuple[int, str] | None:
    """The first token (id, text) of the tokenizer in model_dir that the one in other_dir does not have under the same id; None when it has
    all. Templates and end tokens may differ."""
    theirs, ours = (
        _backend_of(folder, _read_json(folder / "tokenizer_config.json"), trust_remote_code).get_vocab(with_added_tokens=True)
        for folder in (Path(other_dir).expanduser(), Path(model_dir).expanduser())
    )
    return min(((number, token) for token, number in ours.items() if theirs.get(token) != number), default=None)


def _backend_of(folder: Path, settings: Mapping[str, Any], trust_remote_code: bool) -> Tokenizer:
    wants_code = "AutoTokenizer" in (settings.get("auto_map") or {})
    file = folder / "tokenizer.json"
    if file.is_file() and not (wants_code and trust_remote_code):
        return _read_backend(file)
    return _backend_from_transformers(folder, wants_code, trust_remote_code)


def _check_variables(template: str | None, variables: Mapping[str, Any]) -> None:
    """Raise UserError for a variable that the template does not read."""
    if not variables:
        return
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        read = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template or ""))
    except TemplateSyntaxError:  # render_chat() will say what is wrong with it
        return
    known = read - NOT_THE_USERS
    for name in sorted({*variables} - known):
        raise UserError(f"{VARIABLES}: the model's chat template reads no variable {name}; it reads {', '.join(sorted(known)) or 'none'}")


def _read_backend(file: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_buffer(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not a readable tokenizer file ({error}); fetch it again") from error
    backend.no_padding()  # a file saved after training may ask for padding or truncation; prompts are never padded or cut
    backend.no_truncation()
    return backend


def _backend_from_transformers(folder: Path, wants_code: bool, trust_remote_code: bool) -> Tokenizer:
    if wants_code and not trust_remote_code:
        raise UserError(
            f"{folder}: there is no tokenizer.json, and tokenizer_config.json wants to run code from the folder; "
            "if you trust it, set rollout.trust_remote_code: true"
        )
    if not wants_code and not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json is missing); copy the tokenizer files of the model into the folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be read ({error}); copy the tokenizer files of the model once more") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{folder}: its tokenizer has no fast form; convert it to tokenizer.json (AutoTokenizer(...).save_pretrained)")
    return backend


def _bos_that_is_added(backend: Tokenizer, settings: dict[str, Any]) -> int | None:
    """The BOS id with which every text begins, or None. `add_bos_token` in tokenizer_config.json decides; without it, tokenizer.json."""
    bos = _content(settings.get("bos_token"))
    bos_id = None if bos is None else backend.token_to_id(bos)
    if bos_id is None:
        return None
    adds = settings.get("add_bos_token")
    if adds is None:
        adds = backend.encode("a").ids[:1] == [bos_id]
    return bos_id if adds else None


def _eos_token_ids(folder: Path, backend: Tokenizer, settings: dict[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        found += (ids := [] if ids is None else ids if isinstance(ids, list) else [ids])
        if not all(type(i) is int for i in ids):
            raise UserError(
                f"{folder / name}: eos_token_id is {json.dumps(ids)[1:-1]}, no token's number, nor a list of such; fetch it again"
            )
    eos = _content(settings.get("eos_token"))
    eos_id = None if eos is None else backend.token_to_id(eos)
    found += [] if eos_id is None else [eos_id]
    if not found:
        raise UserError(f"{folder}: no end token; give eos_token_id in generation_config.json or config.json")
    return tuple(dict.fromkeys(found))


def _content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a special token in tokenizer_config.json, which is a string or an object that holds one."""
    return token["content"] if isinstance(token, dict) else token


def _with_named_template(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with one chat template: of folders with several named ones, the one called `default`."""
    templates = settings.get("chat_template")
    if isinstance(templates, list):
        return settings | {"chat_template": {t["name"]: t["template"] for t in templates}.get("default")}
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object; fetch it again")
    return found
