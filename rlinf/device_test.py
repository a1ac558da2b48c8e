"""Which device a process computes on."""

from __future__ import annotations

import pytest

from rlinf import device
from rlinf.errors import UserError


@pytest.mark.parametrize(
    ("setting", "present", "usable", "found"),
    [("cpu", True, True, "cpu"), ("auto", False, False, "cpu"), ("auto", True, True, "cuda"), ("cuda", True, True, "cuda")],
)
def test_the_device_is_the_one_that_is_asked_for(
    setting: str, present: bool, usable: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: present)
    monkeypatch.setattr(device, "usable", lambda: usable)
    assert device.choose(setting).type == found


@pytest.mark.parametrize(("setting", "present"), [("auto", True), ("cuda", True), ("cuda", False)])
def test_a_gpu_that_torch_cannot_use_does_not_become_the_cpu(setting: str, present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: present)
    monkeypatch.setattr(device, "usable", lambda: False)
    with pytest.raises(UserError, match=rf"cluster.device is {setting}, but .* NVIDIA GPU: .*set cluster.device to cpu"):
        device.choose(setting)
