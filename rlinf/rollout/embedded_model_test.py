"""Weights that lie side by side are taken as one matrix without a copy; others are put together. A model is of one version or of none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlinf.rollout.embedded_model import EmbeddedModel, joined
from rlinf.weights.architecture import open_architecture
from rlinf.weights.tensor_folder import open_hf_folder
from tests.tiny import make_tiny_model


def test_parts_that_follow_one_another_are_one_view() -> None:
    whole = torch.arange(60.0).view(10, 6)
    view = joined([whole[1:4], whole[4:5], whole[5:9]])
    assert torch.equal(view, whole[1:9]) and view.data_ptr() == whole[1:].data_ptr()


def test_parts_that_do_not_are_copied_in_their_order() -> None:
    whole = torch.arange(60.0).view(10, 6)
    for parts in ([whole[0:2], whole[3:5]], [whole[3:5], whole[0:3]], [whole[:2], whole[2:4].clone()], [whole[:, :3], whole[:, 3:]]):
        out = joined(parts)
        assert torch.equal(out, torch.cat(parts)) and out.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_a_load_that_runs_out_of_memory_leaves_no_model_of_two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path, layers=2)
    model, weights = EmbeddedModel(open_architecture(folder), torch.float32, torch.device("cpu"), 16), open_hf_folder(folder)
    token, at = torch.tensor([3]), torch.tensor([0])

    def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return queries.flatten(1)

    model.load(weights.items())
    before = model.forward(token, at, attend)
    make = model._make_layer

    def full(i: int, arrived: Any) -> Any:
        if i:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(i, arrived)

    monkeypatch.setattr(model, "_make_layer", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        model.load([(name, tensor + 1) for name, tensor in weights.items()])
    with pytest.raises(RuntimeError, match="load\\(\\) before use"):
        model.forward(token, at, attend)
    monkeypatch.undo()
    model.load(weights.items())
    assert torch.equal(model.forward(token, at, attend), before)
