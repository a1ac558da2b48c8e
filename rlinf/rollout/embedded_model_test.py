"""Weights that lie side by side are taken as one matrix without a copy; others are put together."""

import torch

from rlinf.rollout.embedded_model import joined


def test_parts_that_follow_one_another_are_one_view() -> None:
    whole = torch.arange(60.0).view(10, 6)
    view = joined([whole[1:4], whole[4:5], whole[5:9]])
    assert torch.equal(view, whole[1:9]) and view.data_ptr() == whole[1:].data_ptr()


def test_parts_that_do_not_are_copied_in_their_order() -> None:
    whole = torch.arange(60.0).view(10, 6)
    for parts in ([whole[0:2], whole[3:5]], [whole[3:5], whole[0:3]], [whole[:2], whole[2:4].clone()], [whole[:, :3], whole[:, 3:]]):
        out = joined(parts)
        assert torch.equal(out, torch.cat(parts)) and out.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
