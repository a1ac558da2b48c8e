"""`rlinf export`: the weights of a checkpoint as a Hugging Face model folder, in any dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlinf.config.model import read_config
from rlinf.config.settings import parse, python_value
from rlinf.errors import RunFailed, UserError
from rlinf.run_folder.checkpoints import read_checkpoint
from rlinf.run_paths import CONFIG_FILE
from rlinf.weights.architecture import read_architecture
from rlinf.weights.checkpoint_part import open_part
from rlinf.weights.dtypes import DTYPES, dtype_name
from rlinf.weights.hf_folder import finish_hf_folder
from rlinf.weights.mapping import hf_shapes
from rlinf.weights.tensor_folder import TensorFolder, open_hf_folder, sync, write_tensors


def export(step_dir: Path, out: Path, dtype: str | None, model_dir: Path | None) -> dict[str, Any]:
    """Write the folder `out` from the fp32 master weights of a step_* folder (or of its actor/). Returns what to tell the user.

    It is written under another name, read back, and only then renamed to `out`.
    model_dir: where configuration and tokenizer come from; None = the checkpoint's hf/, or else the model that the run began with.
    dtype: fp32, bf16, fp16; None = that of hf/, or else of the model. Raises UserError.
    """
    step_dir = step_dir.expanduser().resolve()
    step_dir = step_dir.parent if step_dir.name == "actor" else step_dir
    if out.exists():
        raise UserError(f"{out} exists; nothing was written: name a folder that does not")
    read_checkpoint(step_dir)
    weights = open_part(step_dir / "actor")["param"]
    model_dir = model_dir or _model_dir(step_dir)
    config = _config(model_dir)
    _check_fit(weights, config, step_dir, model_dir)
    wanted = DTYPES[dtype] if dtype else _dtype_of(config, model_dir)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    name = dtype_name(wanted)
    try:
        stored = finish_hf_folder(partial, model_dir, write_tensors(partial, "export", _cast(weights, wanted)), name)
        for _ in TensorFolder.of(partial, stored).values():  # reading a tensor compares it with its checksum
            pass
        if open_hf_folder(partial).keys() != stored.keys():
            raise RunFailed(f"{partial}: the index does not name the tensors that were written")
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{partial}: cannot be written ({error}); make room there, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(out.parent)
    return {"tensors": len(stored), "dtype": name, "configuration and tokenizer": model_dir, "model": out}


def _config(model_dir: Path) -> dict[str, Any]:
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir}: no config.json, so no model folder; name that of the model with --model-dir")
    return read_config(model_dir / "config.json")


def _dtype_of(config: dict[str, Any], model_dir: Path) -> torch.dtype:
    """The dtype that the model's configuration names; bf16 when it names none."""
    by_name = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(key)
    if name is None:
        return torch.bfloat16
    if not isinstance(name, str) or name not in by_name:
        raise UserError(
            f"{model_dir}/config.json: {key} is {json.dumps(name)}, none of {', '.join(by_name)}; fix it, or name one with --dtype"
        )
    return by_name[name]


def _model_dir(step_dir: Path) -> Path:
    """Where configuration and tokenizer are when the user does not say so."""
    if (step_dir / "hf" / "config.json").is_file():
        return step_dir / "hf"
    run_config = step_dir.parent.parent / CONFIG_FILE
    if run_config.is_file():
        tree = python_value(parse(run_config.read_bytes(), str(run_config)))
        section = tree.get("rollout") if isinstance(tree, dict) else None
        found = section.get("model_dir") if isinstance(section, dict) else None
        if isinstance(found, str) and Path(found, "config.json").is_file():
            return Path(found)
    raise UserError(
        f"{step_dir} has no hf/, and the model that the run began with is not on this machine: name its folder with --model-dir"
    )


def _check_fit(weights: TensorFolder, config: dict[str, Any], step_dir: Path, model_dir: Path) -> None:
    expected = hf_shapes(read_architecture(config, model_dir / "config.json"))
    if weights.keys() != expected.keys():
        name = sorted(weights.keys() ^ expected.keys())[0]
        where = f"is in {step_dir} but not in the model of" if name in weights else f"is missing in {step_dir} for the model of"
        raise UserError(f"tensor {name} {where} {model_dir}/config.json: it is another model's; name the right one with --model-dir")
    for name, shape in expected.items():
        found = weights.shape(name)
        if found != shape:
            raise UserError(
                f"{step_dir}: tensor {name} is {found}, but {shape} in {model_dir}/config.json; name the right model with --model-dir"
            )


def _cast(weights: TensorFolder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        yield name, tensor.to(dtype)
