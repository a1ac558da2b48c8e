"""Writes and reads the part of a checkpoint that belongs to a role: master weights and moments (weights.checkpoint_part), and the model as
a Hugging Face folder.

    actor/    what training goes on from; opens in any layout
    hf/       the model in the compute dtype, read back and compared by log-probabilities before the checkpoint counts
    critic/   the same of the critic, its model in critic/hf/: a sequence classification model with one label, compared by its values

That a checkpoint is complete (written under another name, renamed, marked COMPLETE) is ensured by run_folder.checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlinf.errors import RunFailed, UserError
from rlinf.files import read_json, write_json
from rlinf.training.engine import MegatronEngine
from rlinf.training.packed_batch import pack_sequences
from rlinf.training.parallel import wait_for_all
from rlinf.weights.adapters import refuse_other_adapters, refuse_other_base, what_binds
from rlinf.weights.architecture import open_architecture
from rlinf.weights.checkpoint_part import KINDS, open_part, write_index
from rlinf.weights.dtypes import dtype_name
from rlinf.weights.hf_folder import finish_hf_folder
from rlinf.weights.tensor_folder import Stored, TensorFolder, write_tensors

WRITTEN = ("model", *KINDS)  # in this order: the gathers behind it are collective
PROBES, PROBE_TOKENS = 2, 24
PROBE_TOLERANCE = 1e-5  # same weights, same layout, same kernels: nothing but an atomic addition may differ
Named = tuple[str, Tensor]


class Writing:
    """One checkpoint that is being written. Constructor and finish() are collective over the role's ranks.

    In the foreground, the constructor returns when the tensors are written; at any time only the tensors of one file are in memory. In the
    background, it returns when the writers (the first rank of each stage) have a copy of their stage's state in host memory, which takes 12
    bytes for each parameter and the model in the compute dtype. The engine may then train on.
    """

    def __init__(self, engine: MegatronEngine, step_dir: Path, model_dir: Path, background: bool = False, role: str = "actor") -> None:
        self.engine, self.step_dir, self.model_dir = engine, step_dir, model_dir
        self.part, self.hf = step_dir / role, step_dir / "hf" if role == "actor" else step_dir / role / "hf"
        at = engine.at
        self.writer = at.leads and at.dp_rank == 0
        self.state: dict[str, Any] = {
            "steps": engine.steps,
            "adam_steps": engine.optimizer_state.steps(),
            "loss_scaler": engine.loss_scaler(),
        }
        self.state["lora"] = what_binds(engine.lora)
        with engine.adapters.in_the_weights():
            self.probed = probe(engine)
        self._written: Future[dict[str, Stored]] = Future()
        if not background:
            self._written.set_result(self._write({kind: self._own(engine.export(kind)) for kind in WRITTEN}))
            return
        kept = {kind: [(name, t.to("cpu", copy=True)) for name, t in self._own(engine.export(kind))] for kind in WRITTEN}
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written = thread.submit(self._write, kept)
        thread.shutdown(wait=False)  # it ends after this one; the process waits for it at its exit

    @property
    def written(self) -> bool:
        """Whether this rank's files are on disk. Raises RunFailed when they could not be written."""
        return self._written.done() and self._result() is not None

    def finish(self) -> None:
        """Wait for the files, complete hf/, and compare what is in it with what the engine computed. Raises RunFailed when they differ."""
        dtype = dtype_name(self.engine.config.params_dtype)
        own: list[tuple[dict[str, Stored], dict[str, str]]] = [({}, {})] * dist.get_world_size()
        dist.all_gather_object(own, (self._result(), self.engine.base))
        stored: list[dict[str, Stored]] = [{}]
        if dist.get_rank() == 0:
            written = {n: s for part, _ in own for n, s in part.items()}
            self.state["base"] = {n: xxh3 for _, base in own for n, xxh3 in base.items()}
            stored = [finish_hf_folder(self.hf, self.model_dir, written, dtype, self.engine.model.head)]
            write_json(self.part / "index-hf.json", stored[0])
            write_json(self.part / "state.json", self.state)
        dist.broadcast_object_list(stored, src=0)  # nobody reads hf/ before it is complete
        self._compare(TensorFolder.of(self.hf, stored[0]))
        wait_for_all(self.engine.device)

    def _own(self, tensors: Iterable[Named]) -> Iterable[Named]:
        """The tensors on a writer; elsewhere none, but the gather, which is collective, is run to its end."""
        if self.writer:
            return tensors
        for _ in tensors:
            pass
        return ()

    def _write(self, kinds: Mapping[str, Iterable[Named]]) -> dict[str, Stored]:
        """Everything of this rank, one file after another; where the model's tensors are."""
        if not self.writer:
            return {}
        stage = self.engine.at.pp_rank
        model = write_tensors(self.hf, f"model-s{stage}", kinds["model"])
        write_index(self.part, stage, {kind: write_tensors(self.part, f"{kind}-s{stage}", kinds[kind]) for kind in KINDS})
        return model

    def _result(self) -> dict[str, Stored]:
        error = self._written.exception()
        if error is not None:
            raise RunFailed(f"the checkpoint {self.step_dir} could not be written: {type(error).__name__}: {error}") from error
        return self._written.result()

    def _compare(self, hf: TensorFolder) -> None:
        """The weights in `hf` in place of the engine's, for one forward pass:
        no second model, one copy of this rank's share in host memory.

        One replica does it. That the Hugging Face names mean what they say is what the probes of every weight sync show.
        """
        engine = self.engine
        if engine.at.dp_rank:
            return
        if open_architecture(hf.folder) != engine.arch:
            raise RunFailed(f"{hf.folder}: config.json describes another model than the one that was trained")
        params = [param for _, param in engine.state.params]
        with torch.no_grad(), engine.adapters.off():
            kept = [param.to("cpu", copy=True) for param in params]
            engine.state.fill(engine.state.params, hf, lambda param, shard: param.copy_(shard))
            read_back = probe(engine)
            for param, value in zip(params, kept):
                param.copy_(value)
        for expected, got in zip(self.probed, read_back):
            gap = float((expected - got).abs().max())
            if not gap <= PROBE_TOLERANCE:
                raise RunFailed(
                    f"{hf.folder}: its weights give other numbers (log-probabilities, or a critic's values) than the trained model, "
                    f"by {gap:.3g}"
                )


def probe(engine: MegatronEngine) -> list[Tensor]:
    """Log-probabilities of fixed token sequences (head `scalar`: its numbers); empty on all but the last stage."""
    tokens = np.random.Philox(key=[1234, 0]).random_raw((PROBES, PROBE_TOKENS)) % engine.arch.vocab
    packed = pack_sequences(list(tokens.astype(np.int64)), engine.pad_to, engine.device)
    return [logprobs for logprobs, _ in engine.logprobs([packed])] if engine.model.head == "lm" else engine.scores([packed])


def save(engine: MegatronEngine, step_dir: Path, model_dir: Path, role: str = "actor") -> None:
    """Write a role's part and hf/ below step_dir.

    Collective; returns on all ranks after everything is on disk and hf/ has been compared.
    """
    Writing(engine, step_dir, model_dir, role=role).finish()


def load(engine: MegatronEngine, step_dir: Path, role: str = "actor") -> None:
    """Restore weights, moments and step counts, whatever layout they were saved from."""
    part = step_dir / role
    state = read_json(part / "state.json")
    stored = open_part(part)
    refuse_other_adapters(part, state, engine.lora, role)
    refuse_other_base(part, state, engine.base, "rollout.model_dir" if role == "actor" else f"{role}.model_dir")
    expected = engine.state.trained_shapes
    for name in sorted(stored["param"].keys() | expected.keys()):
        found, wanted = stored["param"].shape(name), expected.get(name)  # raises UserError for one that is missing
        if found != wanted:
            raise UserError(
                f"{part}: tensor {name} is {found}, but {wanted or 'not'} in the model of this run: a checkpoint goes on with the "
                "model that it was made of; to begin with other weights set their folder in a new run"
            )
    engine.load_state(stored, state["steps"], state["adam_steps"])
    if state["loss_scaler"] and engine.loss_scaler():  # another precision starts its own
        engine.set_loss_scaler(state["loss_scaler"])
