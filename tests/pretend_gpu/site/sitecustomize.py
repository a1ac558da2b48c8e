"""Gives this process a pretend GPU (tests/pretend_gpu): the modules that would look for a real one are changed when they are imported."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


def before_torch(spec: ModuleSpec) -> None:
    """The device has to be registered before torch asks for the first time whether it was built with CUDA."""
    libraries = Path(spec.origin).parent / "lib"
    for pattern in ("libgomp*", "libc10.so", "libtorch_cpu.so"):
        for library in libraries.glob(pattern):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ["RLINF_PRETEND_GPU"], mode=ctypes.RTLD_GLOBAL)


def after_torch(_: ModuleType) -> None:
    spec = importlib.util.spec_from_file_location("pretend_torch_cuda", Path(__file__).parent.parent / "torch_cuda.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def after_hardware(module: ModuleType) -> None:
    module.has_gpu = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def after_ray(module: ModuleType) -> None:
    module.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators = staticmethod(lambda: int(os.environ["RLINF_PRETEND_GPUS"]))


class Absent(ModuleType):
    """A package that Transformer Engine names when it is imported, for kernels and formats that nobody asks for here."""

    __version__ = "99.0"
    __path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Anything:
    __getattr__ = Absent.__getattr__

    def __call__(self, *_: object, **__: object) -> Anything:
        return self

    __getitem__ = __call__


class AbsentPackages:
    NAMES = ("onnx", "onnxscript", "triton")

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


absent = AbsentPackages()


def before_transformer_engine(_: ModuleSpec) -> None:
    sys.meta_path.append(absent)


def after_transformer_engine(_: ModuleType) -> None:
    """Others are to see that these packages are not there."""
    sys.meta_path.remove(absent)
    for name in [name for name, module in sys.modules.items() if isinstance(module, Absent)]:
        del sys.modules[name]


def after_its_libraries(module: ModuleType) -> None:
    module.load_framework_extension = nothing  # it is tests/pretend_gpu/extension, by its name


def nothing(_: object) -> None:
    pass


CHANGED: dict[str, tuple[Callable[[ModuleSpec], None], Callable[[ModuleType], None]]] = {
    "torch": (before_torch, after_torch),
    "rlinf.hardware": (nothing, after_hardware),
    "transformer_engine": (before_transformer_engine, after_transformer_engine),
    "transformer_engine.common": (nothing, after_its_libraries),
    "ray._private.accelerators.nvidia_gpu": (nothing, after_ray),
}


class Changer:
    def find_spec(self, name: str, path: list[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name not in CHANGED:
            return None
        before, after = CHANGED[name]
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        before(spec)
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            after(module)

        spec.loader.exec_module = run_and_change
        return spec


if "RLINF_PRETEND_GPU" in os.environ:
    sys.meta_path.insert(0, Changer())
