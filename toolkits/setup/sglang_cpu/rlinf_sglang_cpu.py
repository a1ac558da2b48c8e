"""Lets SGLang run where torch has no CUDA. A .pth file imports this module in every process of the environment, before SGLang.

PyPI's torchvision is a CUDA build and refuses to be imported beside a CPU torch, because two operators are not registered; SGLang
imports it for its processors of images, which text models never call. And SGLang's weights checker waits for the GPU, whatever
device it runs on. Both are arranged when torchvision is first imported; until then nothing heavy is loaded.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

kept: list[object] = []  # a torch.library registration lives as long as its object


class BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        kept.append(library)
        if not torch.cuda.is_available():
            torch.cuda.synchronize = lambda device=None: None  # nothing runs asynchronously on CPU


sys.meta_path.insert(0, BeforeTorchvision())
