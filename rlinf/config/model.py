"""Checks of the model folder: does it have what a run needs, and does the model's shape fit the parallel sizes. Reads JSON and file names
only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlinf.config.keys import known_keys
from rlinf.config.load import EXAMPLES, show, value_of
from rlinf.config.own_code import file_of, is_own
from rlinf.config.schema import Config
from rlinf.config.values import unique_keys
from rlinf.errors import UserError
from rlinf.run_paths import step_name, step_of

DATA = ("data.train_data_paths", "data.val_data_paths")
SHAPES = EXAMPLES / "models"
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a large file
MLP_MATRICES = ("linear_fc1", "linear_fc2")  # of lora.target_modules those that experts take the place of
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_model_config(model_dir: str, key: str = "rollout.model_dir") -> dict[str, Any]:
    """config.json of a Hugging Face folder that `key` names. Raises UserError when the folder cannot be trained from."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"{key}: {model_dir} does not exist; give a local Hugging Face folder (config.json, *.safetensors, tokenizer)")
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{key}: {model_dir} has no config.json; it is not a Hugging Face model folder")
    hf = read_config(config)
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
        found = f"; it has {others[0]}: convert it, e.g. AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)" if others else ""
        raise UserError(f"{key}: {model_dir} has no *.safetensors weights{found}")
    if pointer := next((p for p in sorted(folder.glob("*.safetensors")) if _starts_with(p, LFS_POINTER)), None):
        raise UserError(f"{key}: {pointer} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull` in their repository")
    if key == "rollout.model_dir" and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{key}: {model_dir} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy the model's tokenizer files into it")
    return hf


def planned_model_config(model_dir: str, key: str = "rollout.model_dir") -> tuple[dict[str, Any] | None, list[str]]:
    """For planning on a machine without the model: (config.json of the folder, or of the known model of that name, or None; warnings)."""
    if Path(model_dir).is_dir():
        return load_model_config(model_dir, key), []
    known = SHAPES / (Path(model_dir).name + ".json")
    if known.is_file():
        return read_config(known), [f"{key}: {model_dir} is not on this machine; shapes are taken from {show(known)}"]
    return None, [f"{key}: {model_dir} is not on this machine and its shapes are not known; parallel sizes are not checked against it"]


def validate_model(config: Config, hf: dict[str, Any]) -> None:
    """Check that the model's shape fits the parallel sizes of actor and engine. Raises one UserError that lists every violation.

    The vocabulary needs no rule, because it is padded. An engine may replicate key/value heads over its ranks.
    """
    rollout_tp = config.rollout.tensor_parallel_size
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    found = _misfits("actor", config, hf)
    if heads % rollout_tp or (kv_heads % rollout_tp and rollout_tp % kv_heads):
        found.append(
            f"rollout.tensor_parallel_size = {rollout_tp} does not fit the model's {heads} attention heads and {kv_heads} key/value heads; "
            "it must divide the former, and divide the latter or be a multiple of it"
        )
    positions = hf.get("max_position_embeddings")
    if positions and config.runner.seq_length > positions:
        found.append(f"runner.seq_length = {config.runner.seq_length} exceeds the model's max_position_embeddings {positions}; lower it")
    if found:
        raise UserError(f"the model {config.rollout.model_dir} does not fit this configuration:\n" + "\n".join("  " + f for f in found))


def validate_scorer(config: Config, role: str, hf: dict[str, Any], actor_hf: dict[str, Any]) -> None:
    """Like validate_model, for the model of `critic` or `token_reward`. It must also have the actor's vocabulary; a teacher at least
    its ids, since the larger models of a family may have more rows that no token uses."""
    found, sizes = _misfits(role, config, hf), (hf["vocab_size"], actor_hf["vocab_size"])
    if sizes[0] < sizes[1] or (sizes[0] > sizes[1] and config.head_of(role) == "scalar"):
        remedy = "take one of the actor's family" if config.head_of(role) == "scalar" else "a teacher needs at least as many rows"
        found.append(f"its vocab_size is {sizes[0]}, the actor's {sizes[1]}; {remedy}")
    positions = hf.get("max_position_embeddings")
    if positions and config.runner.seq_length > positions:
        found.append(f"runner.seq_length = {config.runner.seq_length} exceeds the model's max_position_embeddings {positions}; lower it")
    if found:
        raise UserError(
            f"the {role}'s model {config.model_dir_of(role)} does not fit this configuration:\n" + "\n".join("  " + f for f in found)
        )


def experts_of(hf: dict[str, Any]) -> int:
    """The number of experts in a layer by a config.json; 0 = the model has none. transformers 5 writes the second name."""
    return hf.get("num_experts") or hf.get("num_local_experts") or 0


def _misfits(role: str, config: Config, hf: dict[str, Any]) -> list[str]:
    """A tensor-parallel rank holds whole key/value heads with their query heads, and whole experts; a pipeline stage holds equally many
    layers; experts have no adapters."""
    section = getattr(config, role)
    tp, pp = section.model.tensor_model_parallel_size, section.model.pipeline_model_parallel_size
    heads, layers, experts = hf["num_attention_heads"], hf["num_hidden_layers"], experts_of(hf)
    kv_heads = hf.get("num_key_value_heads") or heads
    mlp = ("experts", experts) if experts else ("MLP units", hf["intermediate_size"])
    found = []
    for what, count in (("attention heads", heads), ("key/value heads", kv_heads), mlp):
        if count % tp:
            fitting = _divisors(heads, kv_heads, mlp[1])
            found.append(f"{role}.model.tensor_model_parallel_size = {tp} does not divide the model's {count} {what}; use one of {fitting}")
            break
    if layers % pp:
        found.append(
            f"{role}.model.pipeline_model_parallel_size = {pp} does not divide the model's {layers} layers; use one of {_divisors(layers)}"
        )
    lora = getattr(section, "lora", None)
    if experts and lora and lora.rank and (of_mlp := [name for name in lora.target_modules if name in MLP_MATRICES]):
        found.append(
            f"{role}.lora.target_modules: the model's experts have no adapters, so leave out {' and '.join(of_mlp)}, e.g. "
            f"{role}.lora.target_modules='[linear_qkv,linear_proj]'"
        )
    return found


def missing_paths(config: Config) -> list[str]:
    """A message for each data file, checkpoint or file of the user's own functions that is not on this machine, or is a folder."""
    paths = [(key, str(path)) for key in DATA for path in value_of(config, key)]
    if config.runner.resume_dir not in (None, "auto"):
        paths.append(("runner.resume_dir", str(config.runner.resume_dir)))
    paths += [(key, str(file_of(reference))) for key, reference in own_functions(config)]
    folders = [f"{key}: {path} is a folder; give the JSONL files in it" for key, path in paths if key in DATA and Path(path).is_dir()]
    return [f"{key}: {path} is not on this machine{_beside(key, path)}" for key, path in paths if not Path(path).exists()] + folders


def _beside(key: str, path: str) -> str:
    """The checkpoints that exist beside a missing one: runner.keep_checkpoints removes old ones."""
    others = sorted(step for p in Path(path).parent.glob("*") if (step := step_of(p)) is not None) if key == "runner.resume_dir" else []
    return f"; {Path(path).parent} has {', '.join(map(step_name, others))}" if others else ""


def own_functions(config: Config) -> list[tuple[str, str]]:
    """(key, `file.py:function`) of every function of the user's own that the configuration names."""
    values = [(name, value_of(config, name)) for name, key in known_keys().items() if key.own]
    return [(name, v) for name, value in values for v in (value.values() if isinstance(value, dict) else [value]) if is_own(v)]


def read_config(path: Path) -> dict[str, Any]:
    """The content of a model's config.json. Raises UserError that names file and line when it is not valid."""
    again = "copy the file from the model's source again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}; {again}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 (byte {e.start}); {again}") from e
    except (RecursionError, ValueError) as e:  # nested too deeply; a number of thousands of digits; a key twice
        raise UserError(f"{path}: not readable ({e}); {again}") from e
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object with the model's sizes; {again}")
    return found


def _starts_with(path: Path, start: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
