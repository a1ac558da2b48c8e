"""Every command is refused at the same place for the same mistakes, before it asks for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlinf.checks.tiny_model import write_tiny_tokenizer
from rlinf.config.load import Resolved, load, value_of
from rlinf.errors import UserError
from rlinf.launch.prepare import EXAMPLES, PROMPTS, DataKind, open_run, prepare
from rlinf.run_folder.resuming import SFT, TRAIN, TRAIN_ONLY


def resolved(folder: Path, *words: str) -> Resolved:
    """Six lines to train on, the last two of which are held out too; each is a problem and an example."""
    (folder / "model").mkdir()
    write_tiny_tokenizer(folder / "model")
    rows = [
        {"prompt": f"{i}+{i}=", "task": "math", "query_id": str(i), "solutions": [f"\\boxed{{{2 * i}}}"], "answer": str(i)}
        for i in range(6)
    ]
    for name, those in (("train", rows), ("held_out", rows[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in those))
    place = [f"rollout.model_dir={folder / 'model'}", f"runner.output_dir={folder / 'logs'}", "data.apply_chat_template=false"]
    data = [f"data.train_data_paths=[{folder / 'train.jsonl'}]", f"data.val_data_paths=[{folder / 'held_out.jsonl'}]"]
    sizes = ["data.rollout_batch_size=2", "sft.batch_size=3", "sft.response_key=answer"]
    return load("smollm2-135m-grpo-cpu", [*place, *data, *sizes, *words])


@pytest.mark.parametrize(
    ("command", "kind", "batch_size", "held_out", "what"),
    [(TRAIN, PROMPTS, 2, "validation data: ", "prompts"), (SFT, EXAMPLES, 3, "held-out data: ", "examples")],
)
def test_data_are_read_and_what_is_in_both_files_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: DataKind, batch_size: int, held_out: str, what: str
) -> None:
    run = prepare(resolved(tmp_path), command, kind)
    assert (len(run.training), len(run.held_out), run.sampler.batch_size) == (6, 2, batch_size) and run.sampler.fingerprint
    assert run.folder.command == command and run.tokenizer.decode(run.tokenizer.encode("1+1=")) == "1+1="
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("training data: 6 of 6 ") and told[1].startswith(held_out)
    assert told[2].startswith(f"warning: 2 of 2 {what} of data.val_data_paths are in data.train_data_paths too")


def test_scores_of_other_solutions_another_judge_or_other_sampling_are_not_compared(tmp_path: Path) -> None:
    given, held_out, judge = resolved(tmp_path), tmp_path / "held_out.jsonl", tmp_path / "judge.py"
    judge.write_text("def same(answer, solutions): ...\n")
    own = f"reward.own_tasks={{ours: '{judge}:same'}}"

    def measured_on(*words: str, command: str = TRAIN, kind: DataKind = PROMPTS) -> str:
        place = [f"{key}={value_of(given.config, key)}" for key in ("rollout.model_dir", "runner.output_dir")]
        files = [f"data.train_data_paths=[{tmp_path / 'train.jsonl'}]", f"data.val_data_paths=[{held_out}]"]
        rest = ["data.apply_chat_template=false", "data.rollout_batch_size=2", "sft.batch_size=3", "sft.response_key=answer"]
        run = prepare(load("smollm2-135m-grpo-cpu", [*place, *files, *rest, *words]), command, kind)
        run.folder.release()
        return run.folder.measured_on

    judges = ["reward.answer_format=boxed_or_final_number", "reward.timeout=9", own]
    found = [measured_on(), *(measured_on(word) for word in (*judges, "validation.temperature=1.0"))]
    found.append(measured_on(own, "reward.own_timeout=9"))
    judge.write_text("def same(answer, solutions): return True\n")
    found.append(measured_on(own))
    examples = measured_on(command=SFT, kind=EXAMPLES)
    before = held_out.read_text()
    held_out.write_text(before.replace("boxed{8}", "boxed{88}"))
    found.append(measured_on())
    assert len(set(found)) == len(found) and measured_on(command=SFT, kind=EXAMPLES) == examples
    held_out.write_text(before)
    assert measured_on("reward.reward_scale=1", "reward.num_processes=2") == found[0]


def test_a_command_that_does_not_validate_leaves_the_held_out_file_alone(tmp_path: Path) -> None:
    given = resolved(tmp_path)
    (tmp_path / "held_out.jsonl").unlink()
    assert prepare(given, TRAIN, PROMPTS, validates=False).held_out == []


def test_an_own_function_that_cannot_be_executed_is_refused_but_where_nothing_calls_it(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text("import no_such_package\n\ndef loss(): ...\n")
    given = resolved(tmp_path, f"algorithm.loss_type={own}:loss")
    for command in (TRAIN, TRAIN_ONLY):
        with pytest.raises(UserError, match="mine.py, line 1: No module named 'no_such_package'"):
            open_run(given, command)[0].release()
    open_run(given, SFT)[0].release()


def test_an_own_function_with_other_parameters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def part(response, extra): ...\n")
    with pytest.raises(UserError, match=r"reward.own_parts: .*mine.py:part takes \(response, extra\), but is called as part\(response\): "):
        open_run(resolved(tmp_path, f"reward.own_parts={{a: {tmp_path}/mine.py:part}}"), TRAIN)


def test_a_task_that_nobody_judges_is_refused_in_either_file(tmp_path: Path) -> None:
    for name in ("held_out", "train"):
        folder = tmp_path / name
        folder.mkdir()
        given = resolved(folder)
        path = folder / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"task": "math"', '"task": "poetry"'))
        with pytest.raises(UserError, match="task 'poetry': no verifier"):
            prepare(given, TRAIN, PROMPTS)
