"""The checksum sees names, sizes and contents; the sampled one sees what training changes."""

from pathlib import Path

import numpy as np

from rlinf.weights.checksum import BLOCK, weights_checksum


def folder_of(path: Path, weights: bytes, config: str = "{}") -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    (path / "tokenizer.json").write_text(path.name)  # does not count
    return path


def test_the_whole_content_counts_and_the_rest_does_not(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).bytes(5 * BLOCK // 2)
    flipped = bytearray(weights)
    flipped[-1] ^= 1
    a, b = folder_of(tmp_path / "a", weights), folder_of(tmp_path / "b", weights)
    assert weights_checksum(a) == weights_checksum(b)
    others = [
        folder_of(tmp_path / "c", bytes(flipped)),
        folder_of(tmp_path / "d", weights, "{ }"),
        folder_of(tmp_path / "e", weights + b"x"),
    ]
    assert len({weights_checksum(f) for f in (a, *others)}) == 4


def test_the_sampled_checksum_reads_a_part_and_sees_other_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.bytes(4 * BLOCK)
    unseen = bytearray(weights)
    unseen[BLOCK + 5] ^= 1  # between two blocks that are read
    a, b = folder_of(tmp_path / "a", weights), folder_of(tmp_path / "b", bytes(unseen))
    c = folder_of(tmp_path / "c", rng.bytes(4 * BLOCK))
    assert weights_checksum(a, stride=2 * BLOCK) == weights_checksum(b, stride=2 * BLOCK) != weights_checksum(c, stride=2 * BLOCK)
    assert weights_checksum(a) != weights_checksum(b)
