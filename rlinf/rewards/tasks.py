"""How the answers of each task are judged, and which part of that needs the cage.

math          equivalence of mathematical answers (rewards/math/)
choice        the letter of a multiple-choice question; it is never guessed from prose
exact         the same text, except for white space
rg/<family>   reasoning-gym's scorer of that family; only the full score is right
(others)      functions of the user's own (reward.own_tasks), in the cage
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import rlinf
from rlinf.config.own_code import identified, is_own, load_own
from rlinf.config.schema import RewardConfig
from rlinf.errors import UserError
from rlinf.rewards import reasoning_gym
from rlinf.rewards.math import decide
from rlinf.rewards.math.decide import Decision, gold_answer
from rlinf.rewards.math.words import choice, untext
from rlinf.rewards.own import judge_own

TASKS = ("math", "choice", "exact")
LEAVE_OUT = "leave its prompts out with data.tasks, for example data.tasks=[math]"
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.):]?")


def judge_identity(reward: RewardConfig) -> dict[str, Any]:
    """All that decides whether an answer is right, as JSON values: verdicts are compared only with those of the same judge."""
    own = identified(reward.own_tasks) | ({"own_timeout": reward.own_timeout} if reward.own_tasks and reward.own_timeout else {})
    return {"rlinf": rlinf.__version__, "answer_format": reward.answer_format, "timeout": reward.timeout} | own


def check_tasks(tasks: Iterable[str], own: Collection[str] = (), remedy: str = LEAVE_OUT) -> None:
    """Raise UserError for a task that cannot be judged, and for one of `own` (reward.own_tasks) that has the name of one of ours.

    remedy: what the user can do, besides naming a function for the task.
    """
    for task in sorted(own):
        if task in TASKS or task.startswith("rg/"):
            raise UserError(f"reward.own_tasks: {task} is judged here already; give your task another name, in the data too")
    for task in sorted(set(tasks) - set(own)):
        if task.startswith("rg/"):
            reasoning_gym.check_family(task[3:])
        elif task not in TASKS:
            raise UserError(
                f"task {task!r}: no verifier; known are {', '.join(TASKS)} and rg/<family>. Name a function of yours in reward.own_tasks, "
                f"or {remedy}"
            )


def judge_cheap(task: str, answer: str, solutions: tuple[str, ...]) -> Decision | None:
    """Judge without the cage; None when the cage must decide."""
    if task == "math":
        return decide.judge_cheap(answer, solutions)
    if task == "choice":
        return _judge_choice(answer, solutions)
    if task == "exact":
        text = _exact_text(answer)
        return Decision("right" if text in [_exact_text(gold_answer(s)) for s in solutions] else "wrong", "exact")
    check_tasks([task])
    return None


def judge_caged(task: str, answer: str, solutions: tuple[str, ...]) -> Decision:
    """Judge in the cage. task: `math`, `rg/<family>`, or a function of the user's own."""
    if is_own(task):
        return judge_own(task, answer, solutions)
    if task == "math":
        return decide.judge_caged(answer, solutions)
    return reasoning_gym.judge(task[3:], answer, solutions)


def warm_up(kind: str) -> None:
    """Load what a worker needs for `math`, `rg` or a user's function, so that the first item does not have to wait for it."""
    if is_own(kind):
        load_own(kind)
    elif kind == "rg":
        reasoning_gym.load()
    else:
        decide.warm_up()


def _judge_choice(answer: str, solutions: tuple[str, ...]) -> Decision:
    letter = letter_of(answer)
    if letter is None:
        return Decision("wrong", "no_letter", answer[:200])
    return Decision("right" if letter in [letter_of(gold_answer(s)) for s in solutions] else "wrong", "choice", letter)


def letter_of(answer: str) -> str | None:
    """`B`, `b`, `(B)`, `B.`, `\\text{(B)}`, `(B) 12`, `option B` -> B; None for everything else, several letters included."""
    plain = untext(answer.strip().strip("$")) if len(answer) < 1000 else ""
    if match := _LETTER.fullmatch(plain):
        return match[1].upper()
    labelled = choice(plain)
    return labelled[0] if labelled else None


def name_of(task: str, answer: str) -> str:
    """A name that is the same for answers that are plainly the same, for majority votes: the letter, the exact number, or else the
    cleaned text."""
    if task == "choice":
        return letter_of(answer) or _exact_text(answer)
    if task != "math":
        return _exact_text(answer)
    text = decide.read(answer).text
    number = decide.simple_number(text)
    return str(number) if number is not None else "".join(text.split())


def _exact_text(text: str) -> str:
    return " ".join(text.split())
