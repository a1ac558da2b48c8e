"""The actor's part of a checkpoint: fp32 master weights and Adam moments under their Hugging Face names.

A layout (TP, PP, DP) never reaches the disk, so a checkpoint opens in any other layout, and any safetensors reader can look into it:

    actor/param-s0-00001.safetensors  exp_avg-...  exp_avg_sq-...   written by the first TP and DP rank of each pipeline stage
    actor/index-s0.json               {kind: {tensor: file}}, one a stage
    actor/state.json                  optimizer steps, loss scale
    hf/                               the model as a Hugging Face folder, in the compute dtype

Completeness (write beside, rename, COMPLETE) is the runner's business.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from rlinf.training.engine import MegatronEngine
from rlinf.training.state import OPTIMIZER_STATE
from rlinf.weights.tensor_folder import TensorFolder, read_json, write_json, write_tensors

KINDS = ("param", *OPTIMIZER_STATE)
TOKENIZER_AND_CONFIG = ("*.json", "*.jinja", "*.txt", "*.model")


def save(engine: MegatronEngine, step_dir: Path, model_dir: Path) -> None:
    """Write actor/ and hf/ below step_dir. Collective; returns on all ranks after everything is on disk."""
    at = engine.at
    writer = at.tp_rank == 0 and at.dp_rank == 0
    actor, hf = step_dir / "actor", step_dir / "hf"
    index = {kind: _write(actor, f"{kind}-s{at.pp_rank}", engine.export(kind), writer) for kind in KINDS}
    weight_map = _write(hf, f"model-s{at.pp_rank}", engine.export(), writer)
    if writer:
        write_json(actor / f"index-s{at.pp_rank}.json", index)
    maps: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(maps, weight_map)
    if dist.get_rank() == 0:
        state = {"steps": engine.steps, "adam_steps": engine.optimizer_state.steps(), "loss_scaler": engine.loss_scaler()}
        write_json(actor / "state.json", state)
        _finish_hf(hf, model_dir, {name: file for part in maps for name, file in part.items()}, str(engine.config.params_dtype).removeprefix("torch."))
    dist.barrier()


def load(engine: MegatronEngine, step_dir: Path) -> None:
    """Restore weights, moments and step counts, whatever layout they were saved from."""
    actor = step_dir / "actor"
    files: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for part in sorted(actor.glob("index-s*.json")):
        for kind, names in read_json(part).items():
            files[kind].update(names)
    state = read_json(actor / "state.json")
    engine.load_state({kind: TensorFolder(actor, names) for kind, names in files.items()}, state["steps"], state["adam_steps"])
    if state["loss_scaler"] and engine.loss_scaler():  # another precision starts its own
        engine.set_loss_scaler(state["loss_scaler"])


def _write(folder: Path, stem: str, tensors, writer: bool) -> dict[str, str]:
    if writer:
        return write_tensors(folder, stem, tensors)
    for _ in tensors:  # the gather is collective: every rank runs it to the end
        pass
    return {}


def _finish_hf(hf: Path, model_dir: Path, weight_map: dict[str, str], dtype: str) -> None:
    for pattern in TOKENIZER_AND_CONFIG:
        for file in model_dir.glob(pattern):
            if "safetensors" not in file.name and not (hf / file.name).exists():
                shutil.copyfile(file, hf / file.name)
    config = read_json(hf / "config.json")
    config["dtype"] = config["torch_dtype"] = dtype
    write_json(hf / "config.json", config)
    files = sorted(set(weight_map.values()))
    if len(files) == 1:
        (hf / files[0]).rename(hf / "model.safetensors")
        return
    names = {old: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, old in enumerate(files, 1)}
    for old, new in names.items():
        (hf / old).rename(hf / new)
    size = sum((hf / new).stat().st_size for new in names.values())
    write_json(hf / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": {n: names[f] for n, f in weight_map.items()}})
