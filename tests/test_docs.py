"""The documentation says what is: its commands run, or are checked as far as this machine can; its keys, metrics and files exist.

A command in a fenced bash block of README.md or docs/*.md belongs to one of CLASSES; a command of no class fails. What would take long
(training, evaluation) is resolved like a dry run: the program's own parser, every key and value, the placement. A block that needs more
than one machine says so in the paragraph above it; its commands are looked at all the same.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from rlinf.cli import _parse, _parser, main
from rlinf.config.dropped import dropped_key
from rlinf.config.keys import known_keys, known_sections
from rlinf.config.load import ALIASES, EXAMPLES, ROOT, find, load
from rlinf.config.schema import Config
from rlinf.config.validate import validate, validate_evaluation
from rlinf.data.arithmetic import generate
from rlinf.data.records import Status
from rlinf.evaluation.convert import READERS
from rlinf.evaluation.models import parse_words
from rlinf.metrics.names import METRICS, undocumented
from tests.run_folders import HEALTHY, make_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = re.compile(r"\(needs a (?:cluster|GPU)\):$")  # of the paragraph above a block
SHELL = re.compile(r"\s#\s.*|^#.*|\d?>\S+")  # comments and redirections
OURS = re.compile(r"(?:^|[;&\s\"'])((?:rlinf|bash (?:/shared/rlinf/)?\S+\.sh)(?: [^;&|'\"]*)?)")


class Command(NamedTuple):
    """elsewhere: the page says that this one needs more than the machine of a newcomer has."""

    page: str
    words: tuple[str, ...]
    elsewhere: bool

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


# ---- the commands -------------------------------------------------------------------------------------------------------------------


def commands(text: str, page: str) -> Iterator[Command]:
    """Of the fenced bash blocks; of a block for a cluster only those that are ours, since the shell around them is not for this machine."""
    for above, block in re.findall(r"([^\n]*)\n+```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = OURS.findall(re.sub(r"\$\(\(.*?\)\)", "16", SHELL.sub("", line))) if ELSEWHERE.search(above) else [line]
            marked = bool(ELSEWHERE.search(above)) or line.endswith("# needs a GPU")
            yield from (Command(page, words, marked) for each in found if (words := tuple(shlex.split(each, comments=True))))


def dry_run(words: list[str], here: Path) -> None:
    run([*words, "--dry-run"] if "--dry-run" not in words else words, here)


def run(words: list[str], here: Path) -> None:
    assert main(words[1:]) == 0, words


def parsed(words: list[str], here: Path) -> None:
    _parse(words[1:])


def evaluated(words: list[str], here: Path) -> None:
    """Every key exists, every value is legal; models are stand-ins."""
    words = [stand_in(here, w) if "=" not in w and "/" in w else w for w in words[2:]]
    name, folders, settings = parse_words(words)
    config = load(name, [*settings, f"rollout.model_dir={folders[0]}"]).config
    validate_evaluation(config)


def stand_in(here: Path, folder: str) -> str:
    place = here / "models" / Path(folder).name
    place.mkdir(parents=True, exist_ok=True)
    return str(place)


def converted(words: list[str], here: Path) -> None:
    assert _parse(words[1:]).benchmark in READERS


def imported(words: list[str], here: Path) -> None:
    """From a file with the fields that the command names; what it writes is fit for training."""
    asked = _parse(words[1:])
    row: dict[str, Any] = {}
    for name, value in ((asked.metadata, {}), (asked.prompt, "1+1?"), (asked.answer, f"{asked.after} 2")):
        *path, last = (name or "none").split(".")
        reduce(lambda at, part: at.setdefault(part, {}), path, row)[last] = value
    (here / "foreign.jsonl").write_text(json.dumps(row))
    run([*words[:3], str(here / "foreign.jsonl"), str(here / "imported.jsonl"), *words[5:]], here)
    run(["rlinf", "data", "check", str(here / "imported.jsonl")], here)


def checked(words: list[str], here: Path) -> None:
    run([*words[:3], str(here / "problems.jsonl"), *words[4:]], here)


def trained_by_script(words: list[str], here: Path) -> None:
    config = "smollm2-135m-grpo-cpu" if words[1].endswith("quickstart.sh") else words.pop(2)
    dry_run(["rlinf", "train", config, *words[2:]], here)


def evaluated_by_script(words: list[str], here: Path) -> None:
    evaluated(["rlinf", "eval", *(f"evaluation.{name}.path={words[2]}/{name}.jsonl" for name in READERS), *words[3:]], here)


def ray_script(words: list[str], here: Path) -> None:
    """The script's own parser takes the words; --help ends it before it does anything."""
    done = subprocess.run(["bash", str(ROOT / "ray_utils" / Path(words[1]).name), *words[2:], "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(w in done.stdout for w in words[2:] if w.startswith("--")), done.stderr


def described(words: list[str], here: Path) -> None:
    """The program's own parser takes the words; --help ends it before it does anything."""
    if words[1] == "-m":  # in this process, which has made the imports
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", [*words[2:], "--help"])
            runpy.run_module(words[2], run_name="__main__")
        assert ended.value.code == 0 and all(w in output.getvalue() for w in words if w.startswith("--"))
        return
    command = [sys.executable, *words[1:], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and all(w in done.stdout for w in words if w.startswith("--")), done.stderr


def installed(words: list[str], here: Path) -> None:
    assert shutil.which(words[0], path=f"{Path(sys.executable).parent}:/usr/bin:/bin"), words


def nothing(words: list[str], here: Path) -> None:
    """Shell words that set the stage, and scripts whose own tests run them."""
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()


CLASSES: dict[tuple[str, ...], Callable[[list[str], Path], None]] = {
    ("rlinf", "train"): dry_run,
    ("rlinf", "sft"): dry_run,
    ("rlinf", "eval"): evaluated,
    ("rlinf", "plan"): run,
    ("rlinf", "config"): run,
    ("rlinf", "report"): run,
    ("rlinf", "compare"): run,
    ("rlinf", "verify"): run,
    ("rlinf", "data", "generate"): run,
    ("rlinf", "data", "import"): imported,
    ("rlinf", "data", "check"): checked,
    ("rlinf", "data", "convert"): converted,  # rlinf/evaluation/convert_test.py
    ("rlinf", "check"): parsed,  # rlinf/checks/*_test.py
    ("rlinf", "doctor"): parsed,  # rlinf/checks/doctor_test.py
    ("rlinf", "watch"): parsed,  # rlinf/report/watch_test.py
    ("rlinf", "replay"): parsed,
    ("rlinf", "export"): parsed,  # rlinf/run_folder/export_test.py
    ("bash", "examples/math/quickstart.sh"): trained_by_script,
    ("bash", "examples/math/run_main_math_grpo_megatron.sh"): trained_by_script,
    ("bash", "toolkits/eval/run.sh"): evaluated_by_script,
    ("bash", "start_ray.sh"): ray_script,
    ("bash", "/shared/rlinf/ray_utils/start_ray.sh"): ray_script,
    ("bash", "check_ray.sh"): ray_script,
    ("bash", "tests/run.sh"): nothing,
    ("bash", "toolkits/gpu_acceptance.sh"): nothing,  # toolkits/gpu_acceptance_test.py
    ("bash", "toolkits/setup/venv.sh"): nothing,
    ("bash", "toolkits/setup/sglang_cpu.sh"): nothing,
    ("source", ".venv/bin/activate"): nothing,
    ("python", "-m", "benchmarks.asynchrony"): described,
    ("python", "-m", "benchmarks.rollout_engine"): described,
    ("python", "-m", "benchmarks.vs_trl"): described,
    ("python", "-m", "benchmarks.weight_sync"): described,
    ("python", "benchmarks/quickstart.py"): described,
    ("python", "benchmarks/sampling.py"): described,
    ("python", "-m", "benchmarks.trainer"): described,
    ("python", "benchmarks/verifier.py"): described,
    ("tensorboard", "--logdir"): installed,
    ("mkdocs", "build"): installed,
    **{(name,): installed for name in ("tail", "head", "ls")},
}


def check_of(command: Command) -> Callable[[list[str], Path], None]:
    for n in (3, 2, 1):
        if command.words[:n] in CLASSES:
            return CLASSES[command.words[:n]]
    raise AssertionError(
        f"{command}: no class of this test says how the command is checked; add it, or mark its block `(needs a cluster):`"
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands speak of."""
    folder = tmp_path_factory.mktemp("docs")
    run = make_run(folder / "made", HEALTHY, steps=3, prompts=2)
    for name in ("my-run", "run-a", "run-b", "smollm2-135m-grpo-cpu"):
        shutil.copytree(run, folder / "logs" / name)
    generate(folder, 12, 4, 0)
    (folder / "train.jsonl").rename(folder / "problems.jsonl")
    (folder / "responses.jsonl").write_text('{"response": "so \\\\boxed{\\\\frac{1}{2}}", "solutions": ["\\\\boxed{0.5}"]}\n')
    return folder


@pytest.mark.parametrize("command", dict.fromkeys(c for page in PAGES for c in commands(page.read_text(), page.name)), ids=str)
def test_a_documented_command_works(command: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    check_of(command)(list(command.words), here)


def test_what_needs_a_gpu_says_so() -> None:
    """A command that would start work by its configuration runs on two CPU cores, or is marked."""
    starting = {dry_run, evaluated, trained_by_script, evaluated_by_script}
    found = [c for page in PAGES for c in commands(page.read_text(), page.name) if check_of(c) in starting and "--dry-run" not in c.words]
    here = {c: configuration(c).cluster for c in found if not c.elsewhere}
    assert len(here) > 5 and [c for c, cluster in here.items() if cluster.device != "cpu" or cluster.num_gpus_per_node > 2] == []
    assert any(c.elsewhere and configuration(c).cluster.device == "auto" for c in found)


def configuration(command: Command) -> Config:
    settings = [w for w in command.words if "=" in w]
    names = [w for w in command.words if (EXAMPLES / f"{ALIASES.get(w, w)}.yaml").is_file()]
    if command.words[1].endswith("quickstart.sh"):
        names = ["smollm2-135m-grpo-cpu"]
    return load(names[0], settings).config if names else load(None, [*settings, "rollout.model_dir=model"]).config


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_stand_in_fenced_blocks(page: Path) -> None:
    assert re.findall(r"^ {4}(?:rlinf|bash|python|pip) .*", page.read_text(), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_text_exist(page: Path) -> None:
    """`rlinf data check FILE`, `rlinf check layout`, ...: the subcommand, its options, and the configuration when one is named."""
    for span in re.findall(r"`rlinf ([a-z][^`]*)`", page.read_text()):
        words, parser = re.sub(r"[\[\]]", "", span).split(), _parser()
        while choices := next((a.choices for a in parser._actions if isinstance(a.choices, dict)), None):
            if not words or not words[0].islower():
                break
            assert words[0] in choices, f"{page.name}: rlinf {span}"
            parser = choices[words.pop(0)]
        options = {o for a in parser._actions for o in a.option_strings}
        assert [w for w in words if w.startswith("--") and w not in options] == [], f"{page.name}: rlinf {span}"
        for word in words[:1]:
            if re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)+", word):
                find(word)


def test_examples_in_python_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/extending.md have a test of their own."""
    monkeypatch.chdir(here)
    blocks = [b for page in PAGES if page.name != "extending.md" for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    spaces: list[dict[str, Any]] = [{} for _ in blocks]
    for block, space in zip(blocks, spaces):
        exec(block, space)
    assert [space["verdict"].status for space in spaces if "verdict" in space] == [Status.RIGHT]


def test_the_example_of_a_record_is_fit_for_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    (here / "record.jsonl").write_text(record)
    assert main(["data", "check", str(here / "record.jsonl")]) == 0, capsys.readouterr()


def test_examples_in_yaml_are_yaml_and_their_commands_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    found = [yaml.safe_load(block) for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    commands = [b["spec"]["entrypoint"] for b in found if "spec" in b]
    assert commands
    for command in commands:
        dry_run(command.split(), here)


def test_a_command_of_no_class_and_a_wrong_word_are_found(here: Path) -> None:
    text = "Do (needs a cluster):\n\n```bash\nif x; then bash check_ray.sh 4 --timeout 9; fi\n```\n\nHere\n\n```bash\nfrobnicate now\n```\n"
    ours, foreign = commands(text, "page")
    assert ours.words == ("bash", "check_ray.sh", "4", "--timeout", "9")
    with pytest.raises(AssertionError, match="page: frobnicate now: no class"):
        check_of(foreign)
    assert main(["train", "smollm2-135m-grpo-cpu", "runner.max_step=1", "--dry-run"]) == 2
    with pytest.raises(SystemExit):
        parsed(["rlinf", "export", "a"], here)


# ---- names --------------------------------------------------------------------------------------------------------------------------

KEY = re.compile(r"((?:" + "|".join(dict.fromkeys(k.split(".")[0] for k in known_keys())) + r")\.[a-z_0-9.*<>]+)(?:[:=].*)?")
METRIC = re.compile(r"((?:" + "|".join(dict.fromkeys(m.split("/")[0] for m in METRICS)) + r")/[a-z_0-9*|@]+)")


def spans(page: Path) -> list[str]:
    """What stands in backticks, fenced blocks apart."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_in_the_text_exist(page: Path) -> None:
    names = [*known_keys(), *known_sections()]
    keys = [m[1] for s in spans(page) if (m := KEY.fullmatch(s)) and not s.endswith((".py", ".md", ".json", ".jsonl", ".yaml"))]
    patterns = [re.escape(k).replace(r"\*", ".*").replace("<benchmark>", "[a-z0-9_]+") for k in keys]
    unknown = [k for k, p in zip(keys, patterns) if not any(re.fullmatch(p, name) for name in names)]
    assert [k for k in unknown if dropped_key(k) is None] == []  # a page may say of a foreign key that it is refused


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_metrics_in_the_text_exist(page: Path) -> None:
    found = [m[1] for s in spans(page) if (m := METRIC.fullmatch(s))]
    names = []
    for name in found:
        stem, *ends = name.split("|")
        names += [stem, *(f"{stem.rpartition('_')[0]}_{end}" for end in ends)]
    missing = undocumented(n for n in names if not n.endswith("*"))
    empty = [n for n in names if n.endswith("*") and not any(m.startswith(n[:-1]) for m in METRICS)]
    assert missing + empty == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_in_the_text_exist(page: Path) -> None:
    files = [
        s
        for s in spans(page)
        if re.fullmatch(r"(?:rlinf|tests|toolkits|examples|requirements|benchmarks|docs|docker|ray_utils)/[\w./-]+", s)
    ]
    assert [f for f in files if not (ROOT / f).exists()] == []


RECIPES = re.findall(
    r"^\| ([\w+.]+(?: as published)?) \| (`\w+: .*`) \|$",
    (ROOT / "docs" / "algorithms.md").read_text().split("## Recipes")[1],
    re.MULTILINE,
)


@pytest.mark.parametrize(("method", "cells"), RECIPES, ids=[m for m, _ in RECIPES])
def test_a_recipe_can_be_run(method: str, cells: str) -> None:
    keys = dict(span.split(": ") for span in re.findall(r"`([^`]+)`", cells) if ": " in span)
    assert len(keys) > 1
    base = "smollm2-135m-ppo-cpu" if keys.get("adv_type") == "gae" else "smollm2-135m-grpo-cpu"  # a critic needs devices
    validate(load(base, [f"algorithm.{key}={value}" for key, value in keys.items()]).config)


# ---- form ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / name / "README.md" for name in ("docker", "toolkits", "toolkits/ckpt_convertor"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the checkout; between the pages of the site the build looks at anchors too."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL))
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_are_whole(page: Path) -> None:
    """Every row has as many cells as the head, and none stands apart from its table."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines()
    cells = [len(re.sub(r"`[^`]*`|\\\|", "", line).strip().strip("|").split("|")) if line.startswith("|") else 0 for line in lines]
    tables = [i for i, line in enumerate(lines) if re.fullmatch(r"[|:-]+", line) and cells[i]]
    rows = {j: i for i in tables for j in range(i - 1, next((k for k in range(i, len(lines)) if not cells[k]), len(lines)))}
    assert [lines[j] for j, i in rows.items() if cells[j] != cells[i]] + [
        lines[j] for j, n in enumerate(cells) if n and j not in rows
    ] == []
