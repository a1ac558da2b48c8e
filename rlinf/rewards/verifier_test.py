"""Verdicts, tasks, files, shaping: everything around the equivalence of two answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinf.cli import main
from rlinf.data.records import Status, Verdict
from rlinf.errors import UserError
from rlinf.rewards.math.decide_test import labelled_pairs
from rlinf.rewards.shaping import Shaping, concluded, exploration, soft_overlong, well_formed
from rlinf.rewards.tasks import check_tasks, letter_of
from rlinf.rewards.verifier import Item, Verifier
from rlinf.rewards.verify_file import verify_file


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as v:
        yield v


def test_rewards_follow_the_scale_and_undecided_has_its_own() -> None:
    with Verifier(reward_scale=2.0, undecided_reward=-0.5) as v:
        assert [v.verify(f"\\boxed{{{a}}}", ["7"]).reward for a in ("7", "8", "9^{9^{9^{9}}}")] == [2.0, -2.0, -0.5]
        assert v.verify("no box", ["7"]).reward == -2.0
    with Verifier() as v:
        assert v.verify("\\boxed{9^{9^{9^{9}}}}", ["7"]).reward == -5.0


def test_duplicates_are_judged_once_and_the_order_is_kept(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    pool = verifier._pool_for("math")
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", lambda key: asked.append(key) or submit(key))
    items = [Item("\\boxed{\\sqrt{45}}", ("3\\sqrt{5}",)), Item("\\boxed{1}", ("2",)), Item("so \\boxed{\\sqrt{45}}", ("3\\sqrt{5}",))]
    verdicts = verifier.verify_many(items * 5)
    assert [v.status.value for v in verdicts] == ["right", "wrong", "right"] * 5
    assert len(asked) == 1
    verifier.verify_many(items)
    assert len(asked) == 1


def test_plain_numbers_never_start_a_process() -> None:
    with Verifier() as v:
        for answer, gold in [
            ("42", "42"),
            ("0.5", "\\frac{1}{2}"),
            ("1,000", "1000"),
            ("(1,2)", "(1, 2)"),
            ("\\{2,1\\}", "\\{1,2\\}"),
            ("5 cm", "5"),
            ("x < 3", "(-\\infty, 3)"),
        ]:
            assert v.verify(f"\\boxed{{{answer}}}", [gold]).status is Status.RIGHT
        assert v.worker_pids() == []


def test_one_worker_many_workers_and_another_run_agree(verifier: Verifier) -> None:
    items = [Item(f"\\boxed{{{a}}}", (g,)) for name, pairs in labelled_pairs().items() if name != "beyond the grammar" for g, a, _ in pairs]
    with Verifier(num_processes=2) as two:
        runs = [[(x.status, x.route, x.reason) for x in v.verify_many(items)] for v in (verifier, two)]
    verifier._decided.clear()
    runs.append([(x.status, x.route, x.reason) for x in verifier.verify_many(items)])
    assert runs[0] == runs[1] == runs[2]


# -- tasks


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("\\text{B}", "B"), ("\\text{(B)}", "B"), ("\\textbf{(B)}\\ 12", "B"),
     ("B) 12", "B"), ("option B", "B"), ("AB", None), ("A or B", None), ("A, B", None), ("(A) (B)", None), ("12", None), ("", None),
     ("Because", None)],
)  # fmt: skip
def test_choice_letters(answer: str, letter: str | None) -> None:
    assert letter_of(answer) == letter


def test_choice_and_exact_are_judged_by_their_own_rules(verifier: Verifier) -> None:
    assert verifier.verify("\\boxed{(c)}", ["C"], "choice").status is Status.RIGHT
    assert verifier.verify("\\boxed{3}", ["C"], "choice").route == "no_letter"
    assert verifier.verify("I say C", ["C"], "choice").route == "no_box"
    assert verifier.verify("\\boxed{ab  c}", ["ab c"], "exact").status is Status.RIGHT
    assert verifier.verify("\\boxed{1/2}", ["0.5"], "exact").status is Status.WRONG
    assert verifier.verify("\\boxed{AB c}", ["ab c"], "exact").status is Status.WRONG


def test_a_guess_of_letters_is_right_a_quarter_of_the_time(verifier: Verifier) -> None:
    golds = "ABCDBCDACDAB" * 20
    right = sum(verifier.verify("\\boxed{B}", [g], "choice").status is Status.RIGHT for g in golds)
    assert right == golds.count("B")


def test_an_unknown_task_is_an_error_that_says_what_to_do(verifier: Verifier) -> None:
    with pytest.raises(UserError, match="task 'code': no verifier.*data.tasks"):
        check_tasks(["math", "code"])
    with pytest.raises(UserError, match="no verifier"):
        verifier.verify("\\boxed{1}", ["1"], "code")
    with pytest.raises(UserError, match="gives full marks to any text"):
        check_tasks(["rg/game_of_life_halting"])
    check_tasks(["math", "choice", "exact"])


@pytest.mark.slow
def test_reasoning_gym_pays_only_full_marks() -> None:
    gym = pytest.importorskip("rlinf.rewards.reasoning_gym")
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match="no such family"):
        check_tasks(["rg/nothing_of_the_kind"])
    families = ["chain_sum", "countdown", "prime_factorization", "mini_sudoku", "spell_backward"]
    records = [r for family in families for r in gym.generate(family, 2, seed=3)[0]]
    assert gym.generate("countdown", 1, seed=3, held_out=1) == (records[2:3], records[3:4])
    items = []
    for record in records:
        own = json.loads(record["solutions"][0])["answer"]
        items += [Item(f"\\boxed{{{answer}}}", tuple(record["solutions"]), record["task"]) for answer in (own, "zzz", "")]
    with Verifier(timeout=5.0) as v:
        statuses = [x.status for x in v.verify_many(items)]
        assert statuses[::3] == [Status.RIGHT] * len(records)
        assert Status.RIGHT not in statuses[1::3] + statuses[2::3]
        partial = v.verify("\\boxed{1 + 1}", records[2]["solutions"], "rg/countdown")
        assert partial.status is Status.WRONG and partial.reason != "score 0"


# -- rlinf verify


def test_a_file_comes_back_line_by_line_with_its_verdicts(tmp_path: Path) -> None:
    rows = [
        {"response": "so \\boxed{42}", "solutions": ["42"], "task": "math", "extra": [1, {"x": "é"}]},
        {"response": "\\boxed{\\sqrt{8}}", "solutions": ["1", "2\\sqrt{2}"]},
        {"response": "no", "solutions": ["1"]},
        {"response": "\\boxed{b}", "solutions": ["B"], "task": "choice"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    source.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    counts = verify_file(source, target, 1)
    out = [json.loads(line) for line in target.read_text().splitlines()]
    assert [o["status"] for o in out] == ["right", "right", "wrong", "right"]
    assert [o["reward"] for o in out] == [5.0, 5.0, -5.0, 5.0]
    assert [o["extracted"] for o in out] == ["42", "\\sqrt{8}", None, "b"]
    assert [o["route"] for o in out] == ["number", "numeric", "no_box", "choice"]
    assert all(o["seconds"] >= 0 for o in out) and out[0]["extra"] == rows[0]["extra"]
    assert counts["lines"] == 4 and counts["right"] == 3 and counts["undecided"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "in.jsonl:2: not JSON"), ("[]", "in.jsonl:2: not a JSON object"), ("9" * 5000, "in.jsonl:2: not readable"),
     ('{"response": "\udcff", "solutions": ["1"]}', "in.jsonl:2: not UTF-8 .byte 14"),
     ('{"solutions": ["1"]}', 'in.jsonl:2: needs "response"'),
     ('{"response": "x", "solutions": "1"}', 'needs "solutions", a list'), ('{"response": "x", "solutions": []}', 'needs "solutions"'),
     ('{"response": "x", "solutions": ["1"], "task": "code"}', "no verifier")],
)  # fmt: skip
def test_a_bad_line_is_named_and_no_file_is_left(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"response": "\\\\boxed{1}", "solutions": ["1"]}\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        verify_file(source, tmp_path / "out.jsonl", 1)
    assert list(tmp_path.iterdir()) == [source]


def test_a_byte_order_mark_is_no_fault_and_an_empty_file_is_one(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('\ufeff{"response": "\\\\boxed{1}", "solutions": ["1"]}\n')
    assert verify_file(source, tmp_path / "out.jsonl", 1)["right"] == 1
    source.write_text("")
    with pytest.raises(UserError, match="in.jsonl: the file is empty"):
        verify_file(source, tmp_path / "out.jsonl", 1)


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"response": "\\\\boxed{1}", "solutions": ["1"]}\n')
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "folder", source / "out.jsonl", source / "a" / "out.jsonl"):
        with pytest.raises(UserError, match=f"{out}: cannot be written .(Is a|Not a|File exists)"):
            verify_file(source, out, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "in.jsonl"]


def test_a_task_that_nobody_judges_is_named_with_file_and_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"response": "1", "solutions": ["1"]}\n{"response": "1", "solutions": ["1"], "task": "maths"}\n')
    with pytest.raises(UserError) as error:
        verify_file(source, tmp_path / "out.jsonl", 1)
    assert str(error.value).startswith(f"{source}:2: task 'maths': no verifier; known are math,") and "data.tasks" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


OWN = """
def half(r):
    return 0.5 if r.prompt == "Q" and r.metadata == {"level": 4} and r.tokens == 7 and r.cut_off else 1 / 0
def rank(responses):
    return [len(responses) + i / 4 for i, _ in enumerate(responses)]
def judge(answer, solutions):
    return {"right": True}[answer]
"""


def paying(folder: Path) -> Path:
    (folder / "fns.py").write_text(OWN)
    config = folder / "paying.yaml"
    config.write_text(
        f"reward:\n  own_tasks: {{mine: '{folder}/fns.py:judge'}}\n  own_parts: {{half: '{folder}/fns.py:half'}}\n"
        f"  own_group_parts: {{rank: '{folder}/fns.py:rank'}}\n  format_reward: 1.0\n  reward_scale: 2.0\n  own_timeout: 20\n"
    )
    return config


def test_a_file_is_given_the_whole_reward_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"prompt": "Q", "solutions": ["1"], "length": 7, "finish": "length"}
    rows = [
        {"response": "\\boxed{1}", **about, "group_id": "a", "metadata": {"level": 4}, "parts": {"old": 1.0}},
        {"response": "\\boxed{2}", **about, "group_id": "a"},
        {"response": "1", **about, "group_id": "b", "finish": "stop"},
        {"response": "\\boxed{right}", **about, "task": "mine", "metadata": {"level": 4}},
        {"response": "\\boxed{left}", **about, "task": "mine"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["verify", str(source), str(target), "--config", str(paying(tmp_path)), "--processes", "1"]) == 0
    out = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["parts"] for row in out] == [
        {"format": f, "own/half": h, "own/rank": r} for f, h, r in ((1, 0.5, 2), (1, 0.5, 2.25), (0, 0, 1), (1, 0.5, 2), (1, 0.5, 2.25))
    ]
    assert [row["reward"] for row in out] == [5.5, 1.75, -1.0, 5.5, 1.75]
    assert out[2]["reason"] == "half: ZeroDivisionError: division by zero (fns.py:3)"
    assert [*map(str.strip, capsys.readouterr().out.splitlines()[5:])] == [
        "reward: 2.7",
        "part format: 0.8",
        "part own/half: 0.4",
        "part own/rank: 1.9",
        "failed in part own/half: 1 of 5 lines, first: ZeroDivisionError: division by zero (fns.py:3)",
        "failed in task mine: 1 of 5 lines, first: KeyError: 'left' (fns.py:7)",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"prompt": "Q"}],
            'in.jsonl:1: needs "length", the number of tokens of the response, for reward.own_parts and reward.own_group_parts',
        ),
        ([{"length": True, "prompt": "Q"}], 'in.jsonl:1: needs "length"'),
        ([{"length": 1}], 'in.jsonl:1: needs "prompt", or "group_id": reward.own_group_parts are given all lines of a problem at once'),
        ([{"length": 1, "prompt": "Q", "finish": "end"}], 'in.jsonl:1: "finish" is "end"; it must be one of stop, length, abort, window'),
        (
            [{"length": 1, "prompt": p} for p in "QRQ"],
            "in.jsonl:3: is of the same problem as line 1, with others between them; put all lines of a problem one after another",
        ),
        ([{"length": 1, "group_id": i} for i in (1, 1, 2, 1)], "in.jsonl:4: is of the same problem as line 2, "),
    ],
)
def test_what_a_reward_depends_on_must_be_in_the_line(
    tmp_path: Path, lines: list[dict], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"response": "1", "solutions": ["1"]} | line) + "\n" for line in lines))
    assert main(["verify", str(source), str(tmp_path / "out.jsonl"), "--config", str(paying(tmp_path)), "--processes", "1"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_a_configuration_that_cannot_judge_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("reward:\n  timeout: -1\n  own_parts: {a: half}\n")
    source = tmp_path / "in.jsonl"
    source.write_text('{"response": "1", "solutions": ["1"], "length": 1}\n')
    for command in (["verify", str(source), str(tmp_path / "out.jsonl")], ["data", "check", str(source)]):
        assert main([*command, "--config", str(tmp_path / "a.yaml")]) == 2
        told = capsys.readouterr().err
        assert "reward.timeout = -1.0" in told and "a: half names no function" in told


# -- parts of the reward


def test_soft_overlong_is_linear_between_the_buffer_and_the_limit() -> None:
    assert [soft_overlong(n, 10, 4) for n in (1, 6, 7, 8, 9, 10, 11)] == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    assert [soft_overlong(n, 20480, 4096) for n in (16384, 17408, 18432, 20480)] == [0, -0.25, -0.5, -1]


def test_exploration_vanishes_for_long_responses_and_is_bounded() -> None:
    assert [exploration(n, 1000.0) for n in (0, 100, 1000, 2000, 10000)] == [-1, -1, -1, -0.5, -0.1]
    assert exploration(5, 0.0) == 0


def test_format_is_one_closed_thinking_section_and_one_box() -> None:
    think = "<think>\n"
    assert (
        well_formed(think, "so </think> \\boxed{1}") and well_formed("", "<think> so </think> \\boxed{1}") and well_formed("", "\\boxed{1}")
    )
    for prompt, response in [
        (think, "\\boxed{1}"),
        (think, "a </think> b </think> \\boxed{1}"),
        ("", "\\boxed{1} \\boxed{2}"),
        ("", "\\boxed{ }"),
        ("", "1"),
        ("", "</think> \\boxed{1}"),
    ]:
        assert not well_formed(prompt, response)


def test_four_levels_of_correctness_and_format() -> None:
    """RaML, arXiv 2505.19815: 1, 0, -0.5, -1; an undecided answer counts as wrong."""
    shaping = Shaping(max_new_tokens=10, four_levels=2.0)
    good, bad = "<think>a</think>\n<conclusion>so \\boxed{1}.</conclusion>\n", "<think>a</think> \\boxed{1}"
    for status, base, levels in ((Status.RIGHT, 2.0, (2, -1)), (Status.WRONG, -2.0, (0, -2)), (Status.UNDECIDED, -2.0, (0, -2))):
        verdict = Verdict(base, status, "1", "number", 0.0)
        shaped = [shaping.apply(verdict, "", text, 8) for text in (good, bad)]
        assert [v.reward for v in shaped] == list(levels) and all(v.status is status for v in shaped)
        assert [dict(v.parts)["four_levels"] for v in shaped] == [level - base for level in levels]


@pytest.mark.parametrize(
    "prompt, response, expected",
    [
        ("Q <think>\n", "a</think><conclusion>\\boxed{1}</conclusion>", True),
        ("Q <think>\n", "<think>a</think><conclusion>\\boxed{1}</conclusion>", False),
        ("", "<think>a</think><conclusion>\\boxed{ }</conclusion>", False),
        ("", "<think>\\boxed{1}</think><conclusion>1</conclusion>", False),
        ("", "<think>a</think>b<conclusion>\\boxed{1}</conclusion>", False),
        ("", "<think>a</think><conclusion>\\boxed{1}</conclusion><conclusion>\\boxed{1}</conclusion>", False),
        ("", "<conclusion>\\boxed{1}</conclusion>", False),
        ("", "<think>a</think><conclusion>\\boxed{1}", False),
    ],
)
def test_a_conclusion_stands_behind_the_thinking_once(prompt: str, response: str, expected: bool) -> None:
    assert concluded(prompt, response) == expected


def test_parts_are_added_and_named_and_leave_the_status_alone() -> None:
    verdict = Verdict(5.0, Status.RIGHT, "1", "number", 0.0)
    shaping = Shaping(max_new_tokens=10, format_reward=0.5, overlong_buffer=4, overlong_penalty=2.0, exploration_penalty=1.0)
    shaped = shaping.apply(verdict, "", "\\boxed{1}", 8)
    assert dict(shaped.parts) == {"format": 0.5, "overlong": -1.0, "exploration": -0.125}
    assert shaped.reward == 5.0 + 0.5 - 1.0 - 0.125 and shaped.status is Status.RIGHT
    assert Shaping(max_new_tokens=10).apply(verdict, "", "", 10) is verdict
    with pytest.raises(ValueError, match="overlong_buffer"):
        Shaping(max_new_tokens=10, overlong_buffer=11)
