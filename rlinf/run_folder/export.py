"""`rlinf export`: the weights of a checkpoint as a Hugging Face model folder, in any dtype; or its adapters, as PEFT has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlinf.config.model import read_config
from rlinf.config.settings import parse, python_value
from rlinf.errors import RunFailed, UserError
from rlinf.files import read_json, sync, write_json
from rlinf.run_folder.checkpoints import read_checkpoint
from rlinf.run_paths import CONFIG_FILE
from rlinf.weights.adapters import Noting, merge, refuse_other_base
from rlinf.weights.architecture import read_architecture
from rlinf.weights.checkpoint_part import open_part
from rlinf.weights.dtypes import DTYPES, dtype_name
from rlinf.weights.hf_folder import finish_hf_folder
from rlinf.weights.mapping import adapted_matrix, hf_shapes
from rlinf.weights.tensor_folder import TensorFolder, open_hf_folder, write_tensor_file, write_tensors


def export(step_dir: Path, out: Path, dtype: str | None, model_dir: Path | None) -> dict[str, Any]:
    """Write the folder `out` from the fp32 master weights of a step_* folder (or of its actor/). Returns what to tell the user.

    It is written under another name, read back, and only then renamed to `out`.
    model_dir: where configuration and tokenizer come from; None = the checkpoint's hf/, or else the model that the run began with. Where
    adapters were trained, they are added to its weights, and None = the model that the run began with.
    dtype: fp32, bf16, fp16; None = that of hf/, or else of the model. Raises UserError.
    """
    step_dir, trained, state = _open(step_dir, out)
    model_dir = model_dir or _model_dir(step_dir, own=not state.get("lora"))
    config = _config(model_dir)
    if state.get("lora"):
        weights = _merged(step_dir / "actor", state, trained, model_dir)
    else:
        _check_fit(trained, config, step_dir, model_dir)
        weights = iter(trained.items())
    wanted = DTYPES[dtype] if dtype else _dtype_of(config, model_dir)
    name = dtype_name(wanted)
    with _appearing_whole(out) as partial:
        stored = finish_hf_folder(partial, model_dir, write_tensors(partial, "export", _cast(weights, wanted)), name)
        for _ in TensorFolder.of(partial, stored).values():  # reading a tensor compares it with its checksum
            pass
        if open_hf_folder(partial).keys() != stored.keys():
            raise RunFailed(f"{partial}: the index does not name the tensors that were written")
    return {"tensors": len(stored), "dtype": name, "configuration and tokenizer": model_dir, "model": out}


def export_adapters(step_dir: Path, out: Path, dtype: str | None) -> dict[str, Any]:
    """Write the adapters of a step_* folder (or of its actor/) as a folder that PEFT opens beside the model that the run began with.

    dtype: fp32, bf16, fp16; None = fp32. Raises UserError, also where all weights were trained.
    """
    step_dir, trained, state = _open(step_dir, out)
    if not state.get("lora"):
        raise UserError(f"{step_dir}: all weights were trained (actor.lora.rank 0), so there are no adapters; leave --adapters out")
    wanted, lora = DTYPES[dtype or "fp32"], state["lora"]
    with _appearing_whole(out) as partial:
        partial.mkdir(parents=True)
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in _cast(trained.items(), wanted)}
        write_tensor_file(partial / "adapter_model.safetensors", named)
        about = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model_of_run(step_dir) or ""),
            "r": lora["rank"],
            "lora_alpha": lora["alpha"],
            "target_modules": sorted({adapted_matrix(name).split(".")[-2] for name in trained}),
            "bias": "none",
            "inference_mode": True,
        }
        write_json(partial / "adapter_config.json", about)
        sync(partial)
    return {"tensors": len(trained), "dtype": dtype_name(wanted), "adapters": out}


def _open(step_dir: Path, out: Path) -> tuple[Path, TensorFolder, dict[str, Any]]:
    """The checkpoint's folder, what was trained, and state.json. Raises UserError, also where `out` exists."""
    step_dir = step_dir.expanduser().resolve()
    step_dir = step_dir.parent if step_dir.name == "actor" else step_dir
    if out.exists():
        raise UserError(f"{out} exists; nothing was written: name a folder that does not")
    read_checkpoint(step_dir)
    return step_dir, open_part(step_dir / "actor")["param"], read_json(step_dir / "actor" / "state.json")


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when all went well and is removed when not. Raises UserError where it cannot be written."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{partial}: cannot be written ({error}); make room there, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(out.parent)


def _merged(part: Path, state: dict[str, Any], adapters: TensorFolder, model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of model_dir in fp32 with the adapters added to them, one tensor at a time."""
    base, adapted = Noting(open_hf_folder(model_dir)), {adapted_matrix(name) for name in adapters}
    for name in state["base"]:
        weight = base[name].float()
        refuse_other_base(part, state, {name: base.digests[name]}, str(model_dir))
        if name in adapted:
            a, b = (adapters[name.removesuffix("weight") + f"lora_{x}.weight"] for x in "AB")
            weight = merge(weight, a, b, state["lora"]["alpha"] / state["lora"]["rank"])
        yield name, weight


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


def _model_dir(step_dir: Path, own: bool) -> Path:
    """Where configuration and tokenizer are when the user does not say so. own: the checkpoint's hf/ has them too."""
    if own and (step_dir / "hf" / "config.json").is_file():
        return step_dir / "hf"
    found = model_of_run(step_dir)
    if found is not None and (found / "config.json").is_file():
        return found
    lacking = f"{step_dir} has no hf/" if own else f"{step_dir} holds adapters, which are added to a model"
    raise UserError(f"{lacking}, and the model that the run began with is not on this machine: name its folder with --model-dir")


def model_of_run(step_dir: Path) -> Path | None:
    """The model folder that the run of a checkpoint began with, by its configuration; None where that is not there."""
    run_config = step_dir.parent.parent / CONFIG_FILE
    tree = python_value(parse(run_config.read_bytes(), str(run_config))) if run_config.is_file() else None
    section = tree.get("rollout") if isinstance(tree, dict) else None
    found = section.get("model_dir") if isinstance(section, dict) else None
    return Path(found) if isinstance(found, str) else None


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


def _cast(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor.to(dtype)
