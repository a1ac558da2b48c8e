"""Sends weights through a folder that all machines can read: safetensors files, which our engines read as buckets and SGLang as model
files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from rlinf.weights.buckets import BUCKET_BYTES, Named, group_into_buckets
from rlinf.weights.dtypes import dtype_name
from rlinf.weights.scan import checksums
from rlinf.weights.source import BucketSpec, Files, TensorSpec

WEIGHTS_FOLDER = "weights"  # in the run's folder; below it each publisher has one of its own
PUBLISHER = re.compile(r"d\d+-s\d+")  # what publisher_name() gives
LENGTH_BYTES = 8  # at the front of a safetensors file: how long its header is


def publisher_name(replica: int, stage: int) -> str:
    return f"d{replica}-s{stage}"


def publish_files(tensors: Iterable[Named], folder: Path, version: int, bucket_bytes: int = BUCKET_BYTES) -> Files:
    """Write the tensors to `folder`/v<version>/*.safetensors, after removing whatever was in `folder`, which belongs to one publisher.

    A file gets its name only when it is complete. Nothing is fsynced: the readers are running now, and after a crash nobody will read it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / f"v{version}"
    place.mkdir(parents=True, mode=0o700)
    return Files(
        tuple(_write(place / f"{i:05d}.safetensors", bucket) for i, bucket in enumerate(group_into_buckets(tensors, bucket_bytes)))
    )


def remove_published(folder: Path) -> None:
    """Remove what publishers below `folder` have left that died before they could withdraw it."""
    for place in folder.glob("*"):
        if PUBLISHER.fullmatch(place.name):
            shutil.rmtree(place, ignore_errors=True)  # a node may still be closing a file: the next start of the run removes the rest


def folders_of(source: Files) -> list[Path]:
    """The folders that hold the files, one for each publisher."""
    return list(dict.fromkeys(Path(bucket.key).parent for bucket in source.buckets))


def _write(path: Path, bucket: Sequence[Named]) -> BucketSpec:
    content = save({name: tensor.cpu().contiguous() for name, tensor in bucket})
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(path)
    header = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    begins = {name: header + entry["data_offsets"][0] for name, entry in json.loads(content[LENGTH_BYTES:header]).items()}
    specs = tuple(TensorSpec(name, dtype_name(t.dtype), tuple(t.shape), begins[name], t.nbytes) for name, t in bucket)
    return BucketSpec(str(path), len(content), *checksums(torch.frombuffer(bytearray(content), dtype=torch.uint8), specs))
