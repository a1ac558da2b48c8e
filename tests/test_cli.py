"""The command line: exit codes, messages, dry runs of everything that ships, and how quick it is."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from rlinf.cli import main
from rlinf.config.load import EXAMPLES, ROOT
from rlinf.errors import RunFailed
from tests.run_folders import HEALTHY, make_run

SCRIPTS = [ROOT / "examples/math/run_main_math_grpo_megatron.sh", ROOT / "examples/math/qwen2.5/run_main_math_grpo_megatron.sh"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "name", [*(p.stem for p in EXAMPLES.glob("*.yaml") if "-sft-" not in p.stem), "grpo-1.5b-megatron", "grpo-7b-megatron"]
)
def test_dry_run_of_every_example_prints_the_placement(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = run(capsys, "train", name, "--dry-run", "rollout.seed=7")
    assert code == 0 and err == ""
    mode = "disaggregated" if name.endswith("-pipeline") else "collocated"
    assert f"placement: {mode}" in out and "nothing was started" in out


def test_dry_run_starts_nothing_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from rlinf.cli import main; assert main(['train', 'grpo-7b-megatron', '--dry-run']) == 0; "
        "print([m for m in ('torch', 'ray', 'megatron', 'transformers', 'numpy') if m in sys.modules])"
    )
    start = time.monotonic()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
    assert time.monotonic() - start < 5
    assert out.stdout.splitlines()[-1] == "[]"
    assert "TP 4 x DP 32 x PP 1" in out.stdout and "64 sglang engine(s) of 2 device(s)" in out.stdout
    assert "16384 samples, 4 optimizer step(s) of 4096" in out.stdout
    assert "AReaL-boba-106k.jsonl is not on this machine" in out.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "rlinf", "--help"], capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)  # whatever else the machine does
    assert min(times) < 0.5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.parametrize("arguments", [[], ["grpo-7b-megatron"], ["algorithm.group_size=32"]])
def test_the_run_scripts_work_from_any_folder(tmp_path: Path, script: Path, arguments: list[str]) -> None:
    out = subprocess.run(["bash", str(script), *arguments, "--dry-run"], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    model = "qwen2.5-7b" if "grpo-7b-megatron" in arguments else "qwen2.5-1.5b"
    assert f"{model}-grpo-megatron.yaml" in out.stdout
    assert f"= {16384 if arguments else 8192} samples" in out.stdout


def test_the_run_script_passes_the_exit_code_on(tmp_path: Path) -> None:
    out = subprocess.run(["bash", str(SCRIPTS[0]), "nothing-like-this", "--dry-run"], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 2 and "no such configuration" in out.stderr and "Traceback" not in out.stderr


def small_model(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    shape = {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "hidden_size": 64}
    shape |= {"intermediate_size": 128, "vocab_size": 320, **changes}
    for name, text in {"config.json": json.dumps(shape), "model.safetensors": "", "tokenizer.json": "{}"}.items():
        (folder / name).write_text(text)
    return folder


TP2 = "actor.model.tensor_model_parallel_size=2"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runner.max_step=3"], "did you mean runner.max_steps?"),
        (["runner.max_steps=soon"], "runner.max_steps: expected integer, got soon"),
        (["actor.optim.fp16=true"], "use actor.model.precision: fp16"),
        (["algorithm.group_size=1"], "algorithm.group_size = 1 (command line): adv_type grpo"),
        (["algorithm.n_minibatches=3"], "does not divide the global batch of 64 samples"),
        ([TP2, "actor.model.pipeline_model_parallel_size=2"], "cluster.component_placement: the actor needs at least 4 devices"),
        ([TP2, "cluster.num_gpus_per_node=3"], "cluster.component_placement: the actor has 3 devices"),
        (["cluster.num_gpus_per_node=2", "cluster.backend=local"], "cluster.backend: local"),
        (["actor.model.tensor_model_parallel_size=8"], "does not divide the model's 4 attention heads; use one of [1, 2]"),
        (["actor.model.pipeline_model_parallel_size=3"], "does not divide the model's 4 layers"),
        (["rollout.model_dir=/nowhere"], "rollout.model_dir: /nowhere does not exist"),
        (["data.train_data_paths=[/nowhere/a.jsonl]"], "data.train_data_paths: /nowhere/a.jsonl is not on this machine"),
        (["data.val_data_paths=[/]"], "data.val_data_paths: / is a folder; give the JSONL files in it"),
        (["runner.resume_dir=/nowhere/step_000001"], "runner.resume_dir: /nowhere/step_000001 is not on this machine"),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], expected: str
) -> None:
    model = small_model(tmp_path / "model")
    code, out, err = run(capsys, "train", "smollm2-135m-grpo-cpu", f"rollout.model_dir={model}", *words)
    assert code == 2 and out == ""
    assert err.startswith("rlinf: ") and expected in err and "Traceback" not in err


def test_beside_a_checkpoint_that_is_gone_those_that_are_there_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    for name in ("step_1000000", "step_999999", "step_000004", "step_000003.partial", "step_000.bak"):
        (tmp_path / name).mkdir()
    gone = f"runner.resume_dir={tmp_path}/step_000003"
    code, _, err = run(capsys, "train", "smollm2-135m-grpo-cpu", f"rollout.model_dir={model}", gone)
    assert code == 2 and f"step_000003 is not on this machine; {tmp_path} has step_000004, step_999999, step_1000000" in err


@pytest.mark.parametrize(
    ("file", "expected"), [("model.safetensors", "has no *.safetensors weights"), ("tokenizer.json", "has no tokenizer")]
)
def test_an_incomplete_model_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str, expected: str) -> None:
    model = small_model(tmp_path / "model")
    (model / file).unlink()
    for mode in ([], ["--dry-run"]):
        code, out, err = run(capsys, "train", "smollm2-135m-grpo-cpu", f"rollout.model_dir={model}", *mode)
        assert code == 2 and out == "" and f"rollout.model_dir: {model} {expected}" in err


def test_an_unsupported_architecture_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", model_type="mamba")
    code, _, err = run(capsys, "train", "smollm2-135m-grpo-cpu", f"rollout.model_dir={model}", "--dry-run")
    assert code == 2 and "unknown architecture: model_type 'mamba'" in err
    model = small_model(tmp_path / "other", use_sliding_window=True)
    code, _, err = run(capsys, "train", "smollm2-135m-grpo-cpu", f"rollout.model_dir={model}", "--dry-run")
    assert code == 2 and "sliding-window" in err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [(RunFailed("rank 1 died"), 1, "rlinf: rank 1 died\n"), (KeyboardInterrupt(), 130, "rlinf: interrupted\n")],
)
def test_how_a_run_ends_is_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, code: int, message: str
) -> None:
    def launch(resolved: object) -> int:
        raise raised

    monkeypatch.setitem(sys.modules, "rlinf.launch.train", types.SimpleNamespace(train=launch))
    (tmp_path / "a.jsonl").write_text("")
    words = [
        f"rollout.model_dir={small_model(tmp_path / 'model')}",
        f"data.train_data_paths=[{tmp_path}/a.jsonl]",
        "data.val_data_paths=[]",
    ]
    assert run(capsys, "train", "smollm2-135m-grpo-cpu", *words) == (code, "", message)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlinf.config.explain.explain", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["config", "explain", "runner"])


def test_config_show_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "show", "grpo-1.5b-megatron", "runner.max_steps=5")
    assert code == 0 and "max_steps: 5" in out and "# command line" in out and "qwen2.5-1.5b-grpo-megatron.yaml:" in out
    code, out, _ = run(capsys, "config", "explain", "algorithm.group_size", "grpo-1.5b-megatron")
    assert code == 0 and "value    16" in out
    code, out, err = run(capsys, "config", "explain", "algorithm.groupsize")
    assert code == 2 and "did you mean algorithm.group_size?" in err


def test_data_generate_writes_both_splits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (str(tmp_path), "~"):  # the same again
        code, out, _ = run(capsys, "data", "generate", folder, "--train", "30", "--val", "10")
    assert code == 0 and f"train: {tmp_path}/train.jsonl" in out
    assert [len((tmp_path / f).read_text().splitlines()) for f in ("train.jsonl", "val.jsonl")] == [30, 10]
    before = (tmp_path / "train.jsonl").read_bytes()
    code, _, err = run(capsys, "data", "generate", str(tmp_path), "--train", "31", "--val", "10")
    assert code == 2 and "there already, with other content" in err and (tmp_path / "train.jsonl").read_bytes() == before
    code, _, err = run(capsys, "data", "generate", str(tmp_path), "--train", "0")
    assert code == 2 and err.startswith("rlinf: arithmetic data")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "generate", "{file}"], "rlinf: {file}/train.jsonl: cannot be written ("),
        (["report", "{run}", "--output", "{folder}/none/r.html"], "rlinf: {folder}/none/"),
        (["report", "{run}", "--output", "{folder}/" + "r" * 300], "rlinf: {folder}/r"),
        (["report", "{run}", "--output", "{folder}"], "rlinf: {folder}: is a folder; name a file in it with --output"),
        (["report", "{run}", "--output", ""], "rlinf: .: is a folder; name a file in it"),
        (["report", "{run}", "--output", "{run}/config.yaml"], "rlinf: {run}/config.yaml: there already, and no report of rlinf"),
        (["verify", "{run}/metrics.jsonl", "."], "rlinf: .: cannot be written ("),
        (["verify", "{run}/metrics.jsonl", "{run}/metrics.jsonl"], "rlinf: {run}/metrics.jsonl: is the file that is read"),
        (["data", "convert", "gsm8k", "{run}/metrics.jsonl", "{run}/metrics.jsonl"], "rlinf: {run}/metrics.jsonl: is the file that"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "file").write_text("")
    where = {"file": tmp_path / "file", "folder": tmp_path, "run": make_run(tmp_path / "run", HEALTHY, steps=2)}
    code, out, err = run(capsys, *(word.format(**where) for word in words))
    assert code == 2 and out == "" and err.startswith(message.format(**where)) and err.count("\n") == 1


def test_a_report_takes_the_place_of_a_report_and_follows_links(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, page, link = make_run(tmp_path / "run", HEALTHY, steps=2), tmp_path / "page.html", tmp_path / "link"
    page.touch()  # as mktemp does
    link.symlink_to(page)
    for _ in range(2):
        assert run(capsys, "report", str(folder), "--output", str(link))[0] == 0
    assert (
        link.is_symlink()
        and "rlinf</title>" in page.read_text()
        and sorted(p.name for p in tmp_path.iterdir()) == ["link", "page.html", "run"]
    )


def test_a_report_on_a_full_disk_is_one_line_and_leaves_the_page_that_was_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run", HEALTHY, steps=2)
    assert run(capsys, "report", str(folder))[0] == 0
    before = sorted(p.name for p in folder.iterdir()), (folder / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", full)
    code, out, err = run(capsys, "report", str(folder))
    assert code == 2 and out == "" and err.startswith(f"rlinf: {folder}/report.html: cannot be written (No space left on device); ")
    assert err.count("\n") == 1 and (sorted(p.name for p in folder.iterdir()), (folder / "report.html").read_bytes()) == before


RECORDS = "samples/step_000002.jsonl", "samples/tokens_000002.jsonl"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        *((file, {"sample_id": None}, "`sample_id` is null, not a string") for file in RECORDS),
        (RECORDS[0], {"versions": [1, 2]}, "`versions` is [1, 2], not a list of pairs of whole numbers"),
        (RECORDS[0], {"solutions": "4"}, '`solutions` is "4", not a list of strings'),
        (RECORDS[0], {"reward": "much"}, '`reward` is "much", not a number'),
        (RECORDS[1], {"pieces": 3}, "`pieces` is 3, not a list of strings"),
        (RECORDS[1], {"gap_max": "x"}, '`gap_max` is "x", not a number or null'),
        ("environment.jsonl", {"first_step": "x"}, '`first_step` is "x", not a whole number from 0'),
        ("environment.jsonl", {"chat_markers": 3}, "`chat_markers` is 3, not a list of strings"),
        ("metrics.jsonl", {"step": None}, "`step` is null, not a whole number from 0"),
    ],
)
def test_a_record_that_does_not_hold_what_it_should_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, change: dict, said: str
) -> None:
    folder, whole = make_run(tmp_path / "a", HEALTHY, steps=2), make_run(tmp_path / "b", HEALTHY, steps=2)
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | change) + "\n"]))
    read_by = [["report", str(folder)], *([["compare", str(whole), str(folder)]] if name != RECORDS[1] else [])]
    for words in read_by:
        code, out, err = run(capsys, *words)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert f"{name}, line {len(lines)}: {said}; the file is damaged there: take that line out" in err


@pytest.mark.parametrize(
    ("content", "report", "compare"),
    [
        (b"", "holds no settings", "holds no settings"),
        (b"\0\xff\n", "not valid YAML", "not valid YAML"),
        (b"algorithm:\n  max_staleness: x\n", "algorithm.max_staleness is x, no number", None),
        (b"algorithm: [\n", *["config.yaml:2: not valid YAML: while parsing a flow node"] * 2),
    ],
)
def test_a_changed_configuration_of_a_run_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, report: str | None, compare: str | None
) -> None:
    folder = make_run(tmp_path, HEALTHY, steps=2)
    (folder / "config.yaml").write_bytes(content)
    for words, said in ((["report"], report), (["compare", str(folder)], compare)):
        if said is not None:
            code, out, err = run(capsys, *words, str(folder))
            assert code == 2 and out == "" and said in err and str(folder / "config.yaml") in err and err.count("\n") == 1


def test_report_names_a_damaged_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_run(tmp_path, HEALTHY, steps=2)
    for name in ("samples/step_000002.jsonl", "metrics.jsonl"):
        with (folder / name).open("a") as file:
            file.write("\0\0\0\n")
        number = len((folder / name).read_text().splitlines())
        code, out, err = run(capsys, "report", str(folder))
        assert code == 2 and out == "" and f"{name}, line {number}: not JSON" in err


@pytest.mark.parametrize("command", [["train", "a.yaml"], ["sft", "a.yaml"], ["config", "show", "a.yaml"]])
def test_a_file_that_may_not_be_read_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def load(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a.yaml")

    monkeypatch.setattr("rlinf.config.load.load", load)
    code, out, err = run(capsys, *command)
    assert (code, out, err) == (2, "", "rlinf: a.yaml: permission denied; let this user read and write it, or give another path\n")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "a"), OSError(2, "No such file or directory")])
def test_another_fault_of_a_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def explain(*_: object) -> None:
        raise error

    monkeypatch.setattr("rlinf.config.explain.explain", explain)
    with pytest.raises(OSError):
        main(["config", "explain", "runner"])


def test_data_generate_makes_puzzles_of_reasoning_gym(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    tasks = "rg/chain_sum,rg/spell_backward"
    code, out, _ = run(capsys, "data", "generate", str(tmp_path), "--task", tasks, "--train", "6", "--val", "4")
    assert code == 0 and f"val: {tmp_path}/val.jsonl" in out
    train, val = ([json.loads(line) for line in (tmp_path / f).read_text().splitlines()] for f in ("train.jsonl", "val.jsonl"))
    assert [r["task"] for r in train] == ["rg/chain_sum"] * 6 + ["rg/spell_backward"] * 6 and len(val) == 8
    assert len({r["prompt"] for r in train + val}) == 20
    for words, message in (
        (["--task", "rg/none_such"], "no such family; it has ab, acre"),
        (["--task", "rg/chain_sum,rg/chain_sum"], "is named twice"),
        (["--task", "sums"], "can be `arithmetic`, or `rg/<family>`"),
        (["--task", "rg/knight_swap"], "two data sets of one seed differ"),
        (["--task", "rg/chain_sum", "--val", "0"], "each must be at least 1"),
    ):
        code, _, err = run(capsys, "data", "generate", str(tmp_path), *words)
        assert code == 2 and message in err, err


def test_a_mean_response_that_no_response_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "grpo-1.5b-megatron", "--mean-response", "999999")
    assert code == 2 and out == "" and err.startswith("rlinf: --mean-response 999999: no response is longer than algorithm.sampling_params")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        *(
            (["plan", "c", "--mean-response", n], f"--mean-response: '{n}' is no whole number from 1 to ")
            for n in ("-5", "0", "nan", "1.5")
        ),
        *((["compare", "a", "b", "--tolerance", n], f"--tolerance: '{n}' is no finite number from 0") for n in ("-1", "nan", "inf", "x")),
        *((["replay", "a", "--step", "2", "--tolerance", n], f"--tolerance: '{n}' is no finite number") for n in ("-1", "nan")),
        *((["verify", "a", "b", "--processes", n], f"--processes: '{n}' is no whole number from 1 to 1024") for n in ("0", "-1", "5000")),
        *((["data", "generate", "g", "--seed", n], f"--seed: '{n}' is no whole number from 0 to ") for n in ("-1", "9" * 20, "9" * 19)),
        (["check", "resume", "--seed", "-1"], "--seed: '-1' is no whole number from 0 to "),
        (["data", "convert", "gsm8k", "a", "b", "--seed", "-1"], "--seed: '-1' is no whole number from 0 to "),
    ],
)
def test_a_number_out_of_its_range_is_told_by_option_value_and_range(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and f"argument {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["train"], ["train", "x", "--fast"], ["data", "check", "a", "b"], ["data", "generate", "g", "--seed", "9" * 20]],
)
def test_wrong_usage_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2


@pytest.mark.parametrize("words", [["train", "smollm2-135m-grpo-cpu"], ["plan", "smollm2-135m-grpo-cpu"], ["eval", "x"]])
def test_a_setting_with_dashes_is_told_how_it_is_written(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--runner.max_steps=3", "-data.seed=1"])
    assert end.value.code == 2 and "; write runner.max_steps=3 data.seed=1\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--fast"])
    assert "; write" not in capsys.readouterr().err
