"""A file of the user's that cannot be loaded is one message with file and line."""

from pathlib import Path

import pytest

from rlinf.config.own_code import load_own
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
