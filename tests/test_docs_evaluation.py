"""The commands in the documents about evaluation are ones that the program takes: every key exists and every value is legal."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlinf.cli import _parse
from rlinf.config.load import ROOT, load
from rlinf.config.validate import validate_evaluation
from rlinf.evaluation.convert import READERS
from rlinf.evaluation.models import parse_words

DOCS = [ROOT / "docs" / "evaluation.md", ROOT / "docs" / "results.md"]
COMMANDS = [
    shlex.split(line, comments=True)
    for doc in DOCS
    for block in re.findall(r"```bash\n(.*?)```", doc.read_text(), re.DOTALL)
    for line in block.splitlines()
    if re.match(r"rlinf (eval|data)|bash toolkits/eval", line)
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_documented_commands_are_legal(command: list[str], tmp_path: Path) -> None:
    if command[:3] == ["rlinf", "data", "convert"]:
        assert _parse(command[1:]).benchmark in READERS
        return
    words = command[2:]
    if command[0] == "bash":
        assert (ROOT / command[1]).is_file()
        words = [*(f"evaluation.{name}.path={words[0]}/{name}.jsonl" for name in READERS), *words[1:]]
    words = [str(folder(tmp_path, w)) if "=" not in w and "/" in w else w for w in words]
    name, folders, settings = parse_words(words)
    config = load(name, [*settings, f"rollout.model_dir={folders[0]}"]).config
    validate_evaluation(config)
    assert folders


def folder(tmp_path: Path, word: str) -> Path:
    """A stand-in for a model folder of the example."""
    place = tmp_path / Path(word).name
    place.mkdir()
    return place


def test_there_is_a_command_for_every_published_row() -> None:
    text = DOCS[1].read_text().split("## Published by others")[1]
    rows = re.findall(r"^\| ([A-Z]\S+) +\| \d", text, re.MULTILINE)
    assert len(rows) == 6 == len(re.findall(r"^bash toolkits/eval/run.sh /data /models/", text, re.MULTILINE))
