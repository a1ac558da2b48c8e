"""A file of the user's that cannot be loaded is one message with file and line."""

from pathlib import Path

import pytest

from rlinf.config.own_code import check_own, load_own
from rlinf.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def x(:\n", "{file}, line 1: invalid syntax; fix the file"),
        ("import os\n\nimport no_such_package_here\n", "{file}, line 3: No module named 'no_such_package_here'; install it"),
        ("from os import no_such_name\n", "{file}, line 1: cannot import name 'no_such_name'"),
        ("x = 1\n", "{file} has no function x"),
    ],
)
def test_what_keeps_it_from_being_loaded_is_told(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "syn.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_own(f"{file}:x")
    assert str(error.value).startswith(f"{file}:x: {expected.format(file=file)}")


def test_another_error_of_the_users_file_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_own(f"{tmp_path / 'own.py'}:x")


CALLABLE = """
from functools import partial
class Judge:
    def __call__(self, answer, solutions): ...
def one(response): ...
def two(answer, solutions): ...
def three(answer, solutions, extra): ...
def more(answer, solutions, extra=1): ...
def star(*given, **named): ...
def named(answer, *, solutions): ...
def six(a, b, c, d, e, f): ...
call, bound, c, cls = Judge(), partial(three, extra=1), max, Judge
"""


@pytest.mark.parametrize(
    ("key", "fit", "misfits"),
    [
        ("reward.own_tasks", ["two", "more", "star", "call", "bound", "c"], ["one", "three", "named", "six", "cls"]),
        ("reward.own_parts", ["one", "star", "c"], ["two", "three", "named", "call"]),
        ("reward.own_group_parts", ["one", "star", "c"], ["two", "three", "named", "call"]),
        ("algorithm.loss_type", ["six", "star"], ["one", "three"]),
        ("algorithm.adv_type", ["one", "two", "more", "star"], ["three", "named"]),
    ],
)
def test_a_function_that_cannot_take_what_it_is_given_is_refused_without_a_call(
    tmp_path: Path, key: str, fit: list[str], misfits: list[str]
) -> None:
    file = tmp_path / "own.py"
    file.write_text(CALLABLE)
    for name in fit:
        check_own(key, f"{file}:{name}")
    for name in misfits:
        with pytest.raises(UserError, match=f"{key}: .*own.py:{name} takes .*, but is called as {name}\\("):
            check_own(key, f"{file}:{name}")
    if key == "reward.own_tasks":
        with pytest.raises(UserError) as error:
            check_own(key, f"{file}:three")
        assert str(error.value) == (
            f"reward.own_tasks: {file}:three takes (answer, solutions, extra), but is called as three(answer, solutions): "
            "missing a required argument: 'extra'; change its parameters"
        )
