"""Folders of safetensors: what is written comes back bit for bit, lazily; what is damaged is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rlinf.errors import UserError
from rlinf.files import read_json, write_json
from rlinf.weights.tensor_folder import TensorFolder, digest, open_hf_folder, open_tensors, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return {f"t{i}": torch.randn(10, i + 1, generator=generator).to(dtypes[i % 3]) for i in range(7)}


@pytest.mark.parametrize(("file_bytes", "files"), [(1 << 20, 1), (300, 3), (1, 7)])
def test_tensors_come_back_bit_for_bit_from_files_of_bounded_size(tmp_path: Path, file_bytes: int, files: int) -> None:
    made = tensors()
    where = write_tensors(tmp_path, "part", made.items(), file_bytes)
    in_file = {name: stored.file for name, stored in where.items()}
    assert where.keys() == made.keys() and len(set(in_file.values())) == len(list(tmp_path.iterdir())) == files
    folder = TensorFolder.of(tmp_path, where)
    assert len(folder) == 7 and list(folder) == list(made)
    for name, tensor in made.items():
        assert folder[name].dtype == tensor.dtype and torch.equal(folder[name], tensor)
    shared = [f for f in set(in_file.values()) if list(in_file.values()).count(f) > 1]
    assert all(sum(made[n].nbytes for n in where if in_file[n] == f) <= file_bytes for f in shared)


def test_who_may_read_other_new_files_may_read_these(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path, "part", tensors().items())
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_views_and_strided_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    where = write_tensors(tmp_path, "x", {"row": base[1], "transposed": base.t(), "same": base[1]}.items())
    folder = TensorFolder.of(tmp_path, where)
    assert torch.equal(folder["row"], base[1]) and torch.equal(folder["transposed"], base.t()) and torch.equal(folder["same"], base[1])


def test_what_is_written_does_not_follow_later_changes(tmp_path: Path) -> None:
    """The tensors handed in may be views into buffers that are used again before the file is full."""
    buffer = torch.zeros(4)

    def stream():
        for i in range(3):
            buffer.fill_(i)
            yield f"t{i}", buffer

    folder = TensorFolder.of(tmp_path, write_tensors(tmp_path, "x", stream()))
    assert [folder[f"t{i}"][0].item() for i in range(3)] == [0, 1, 2]


def test_nothing_to_write_writes_nothing(tmp_path: Path) -> None:
    assert write_tensors(tmp_path / "new", "x", []) == {} and list((tmp_path / "new").iterdir()) == []


def test_a_file_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    where = write_tensors(tmp_path, "part", tensors().items(), 1)
    (tmp_path / where["t3"].file).unlink()
    folder = TensorFolder.of(tmp_path, where)
    assert folder["t2"].shape == (10, 3)
    with pytest.raises(UserError, match=f"{where['t3'].file}: cannot be read .*missing or damaged"):
        folder["t3"]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    where = write_tensors(tmp_path, "part", tensors().items())
    path = tmp_path / where["t0"].file
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "empty": b"", "garbage": b"\xff" * 100}[damage])
    with pytest.raises(UserError, match="part-00001.safetensors: cannot be read .*missing or damaged"):
        TensorFolder.of(tmp_path, where)["t0"]


@given(position=st.integers(0), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_flipped_bit_anywhere_in_the_file_is_noticed_and_what_it_hit_is_named(tmp_path: Path, position: int, bit: int) -> None:
    made = tensors()
    where = write_tensors(tmp_path, "part", made.items())
    path = tmp_path / "part-00001.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = header + position % (len(content) - header)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    folder, damaged = TensorFolder.of(tmp_path, where), []
    for name, tensor in made.items():
        try:
            assert torch.equal(folder[name], tensor)
        except UserError as error:
            damaged.append(name)
            assert str(path) in str(error) and f"tensor {name} is damaged" in str(error)
    assert len(damaged) == 1


@given(position=st.integers(0), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_flipped_bit_in_the_files_header_never_gives_other_tensors(tmp_path: Path, position: int, bit: int) -> None:
    made = tensors()
    where = write_tensors(tmp_path, "part", made.items())
    path = tmp_path / "part-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[position % (8 + int.from_bytes(content[:8], "little"))] ^= 1 << bit
    path.write_bytes(content)
    folder = TensorFolder.of(tmp_path, where)
    for name, tensor in made.items():
        try:
            assert torch.equal(folder[name], tensor) and folder[name].dtype == tensor.dtype
        except UserError as error:
            assert str(path) in str(error)


def test_the_digest_knows_dtype_and_shape() -> None:
    zeros = torch.zeros(4, dtype=torch.float32)
    others = [
        zeros.view(2, 2),
        torch.zeros(8, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
    ]
    assert len({digest(t) for t in (zeros, *others)}) == 6
    assert digest(torch.arange(6.0).view(2, 3).t()) == digest(torch.arange(6.0).view(2, 3).t().contiguous())


def test_an_unknown_name_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tensor named lm_head.weight; the folder belongs to another model or is incomplete"):
        TensorFolder(tmp_path, {})["lm_head.weight"]


def test_hf_folders_of_one_file_and_of_many(tmp_path: Path) -> None:
    made = {"a": torch.ones(2), "b": torch.zeros(3)}
    save_file(made, tmp_path / "model.safetensors")
    single = open_hf_folder(tmp_path)
    assert set(single) == {"a", "b"} and torch.equal(single["a"], made["a"])
    save_file({"a": made["a"] + 1}, tmp_path / "model-00001-of-00001.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    many = open_hf_folder(str(tmp_path))  # the index decides
    assert list(many) == ["a"] and torch.equal(many["a"], made["a"] + 1)


def test_an_hf_folder_that_cannot_be_read_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model.safetensors and no model.safetensors.index.json"):
        open_hf_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        open_hf_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(UserError, match="model.safetensors.index.json: cannot be read"):
        open_hf_folder(tmp_path)


def test_json_round_trip_and_its_errors(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, 2.5, None]})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5, None]} == json.loads((tmp_path / "x.json").read_text())
    with pytest.raises(UserError, match="y.json: cannot be read .*No such file"):
        read_json(tmp_path / "y.json")
    (tmp_path / "z.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="z.json: cannot be read"):
        read_json(tmp_path / "z.json")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part.safetensors").write_bytes(b"")
    (tmp_path / "index.json").write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for read, name in ((open_tensors, "part.safetensors"), (read_json, "index.json")):
        with pytest.raises(UserError, match=f"{name}: permission denied; let this user read it"):
            read(tmp_path / name)
