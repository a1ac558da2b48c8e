"""The disk transport: files that safetensors reads, buckets that our engines read, each whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlinf.errors import RunFailed
from rlinf.weights.files import folders_of, publish_files
from rlinf.weights.opening import open_source, release
from rlinf.weights.receipts import merge_sources

TENSORS = [("odd", torch.randn(3).bfloat16()), ("a", torch.randn(40, 8)), ("scalar", torch.tensor(2.0)), ("big", torch.randn(2000))]


def test_what_was_written_arrives_and_is_what_safetensors_reads(tmp_path: Path) -> None:
    source = merge_sources(
        [publish_files(TENSORS[:2], tmp_path / "s0", 5), publish_files(TENSORS[2:], tmp_path / "s1", 5, bucket_bytes=1000)]
    )
    assert len(source.buckets) == 3 and folders_of(source) == [tmp_path / "s0" / "v5", tmp_path / "s1" / "v5"]
    received = list(open_source(source))
    assert [name for name, _ in received] == [name for name, _ in TENSORS]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(received, TENSORS))
    theirs = {name: t for bucket in source.buckets for name, t in load_file(bucket.key).items()}
    assert theirs.keys() == dict(TENSORS).keys() and all(torch.equal(theirs[name], t) for name, t in TENSORS)


def test_a_version_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    old, new = (publish_files(TENSORS, tmp_path / "s0", version) for version in (1, 2))
    assert [p.name for p in (tmp_path / "s0").iterdir()] == ["v2"] and len(list(open_source(new))) == len(TENSORS)
    with pytest.raises(RunFailed, match=f"{old.buckets[0].key}: it does not exist"):
        list(open_source(old))
    release(new)
    release(new)
    assert not list((tmp_path / "s0").rglob("*.safetensors"))


def test_a_changed_byte_and_a_file_cut_short_are_named(tmp_path: Path) -> None:
    source = publish_files(TENSORS, tmp_path, 1)
    path = Path(source.buckets[0].key)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunFailed, match=f"{path}: tensor odd, checksum"):
        list(open_source(source))
    path.write_bytes(content[:-1])
    with pytest.raises(RunFailed, match=f"{path}: {len(content) - 1} bytes, expected {len(content)}"):
        list(open_source(source))


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        publish_files(TENSORS, tmp_path, 1)
    assert not list(tmp_path.rglob("*.safetensors"))
