"""Completes a folder of tensor files to a Hugging Face model folder: configuration, tokenizer, file names, index."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from rlinf.files import read_json, sync, write_json
from rlinf.weights.tensor_folder import Stored

TOKENIZER_AND_CONFIG = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")  # code: of trust_remote_code


def finish_hf_folder(folder: Path, model_dir: Path, stored: Mapping[str, Stored], dtype: str, head: str = "lm") -> dict[str, Stored]:
    """Make a model that transformers can open of the files that write_tensors wrote to `folder`. Returns where each tensor is now.

    model_dir: the folder whose configuration and tokenizer are copied. dtype: torch's name of the weights' dtype, such as "bfloat16". head:
    `scalar` makes it a sequence classification model with one label, whatever model_dir holds.
    """
    _copy_configuration(model_dir, folder, dtype, head)
    files = sorted({s.file for s in stored.values()})
    names = {old: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, old in enumerate(files, 1)}
    if len(files) == 1:
        names = {files[0]: "model.safetensors"}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    renamed = {name: Stored(names[s.file], s.xxh3) for name, s in stored.items()}
    if len(files) > 1:
        size = sum((folder / new).stat().st_size for new in names.values())
        index = {"metadata": {"total_size": size}, "weight_map": {name: s.file for name, s in renamed.items()}}
        write_json(folder / "model.safetensors.index.json", index)
    sync(folder)
    return renamed


def _copy_configuration(model_dir: Path, folder: Path, dtype: str, head: str) -> None:
    for pattern in TOKENIZER_AND_CONFIG:
        for file in model_dir.glob(pattern):
            if "safetensors" not in file.name:
                shutil.copyfile(file, folder / file.name)
                sync(folder / file.name)
    config = read_json(folder / "config.json")
    config["dtype"] = config["torch_dtype"] = dtype
    if head == "scalar":
        config["architectures"] = [name.replace("ForCausalLM", "ForSequenceClassification") for name in config.get("architectures") or ()]
        config |= {"id2label": {"0": "value"}, "label2id": {"value": 0}}
    write_json(folder / "config.json", config)
