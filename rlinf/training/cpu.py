"""What megatron-core needs to run without CUDA, fenced in one module: an import hook that rewrites device literals.

Megatron-core names `cuda` in about a hundred places on the dense-GPT path (`torch.cuda.current_device()`, `device='cuda'`, tensor type
strings, RNG state). `install()` rewrites the source of those modules while they are imported, and only then: torch is not modified, and
with CUDA present nothing happens at all. The rewrite is tied to the pinned version: another one is refused loudly.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Sequence
from types import CodeType, ModuleType

from rlinf.device import usable
from rlinf.errors import UserError

PINNED = "0.16.1"

_RULES = [
    (re.compile(r"torch\.cuda\.current_device\(\)"), "'cpu'"),
    (re.compile(r"device\s*=\s*(['\"])cuda\1"), "device='cpu'"),
    (re.compile(r"torch\.device\((['\"])cuda\1\)"), "torch.device('cpu')"),
    (re.compile(r"(['\"])torch\.cuda\.(Float|Half|BFloat16)Tensor\1"), r"'torch.\2Tensor'"),
    (re.compile(r"torch\.cuda\.synchronize\([^()]*\)"), "None"),
    (re.compile(r"torch\.cuda\.empty_cache\(\)"), "None"),
    (re.compile(r"torch\.cuda\.(random\.)?get_rng_state\([^()]*\)"), "torch.get_rng_state()"),
    (re.compile(r"torch\.cuda\.manual_seed\("), "torch.manual_seed("),
    (re.compile(r"\.cuda\((torch\.cuda\.current_device\(\)|'cpu')?\)"), ".cpu()"),
]
_BY_MODULE = {
    # the RNG tracker sets torch's CPU generator, so its check that "the CPU generator did not change" no longer applies
    "megatron.core.tensor_parallel.random": [
        (re.compile(r"(def _set_cuda_rng_state\(.*?\):\n)", re.S), r"\1    return torch.set_rng_state(new_state)\n"),
        (re.compile(r"if not torch\.all\(cpu_rng_state == torch\.get_rng_state\(\)\)\.item\(\):"), "if False:"),
    ],
    # jit_fuser compiles with inductor at import; on CPU the plain functions are what we want
    "megatron.core.jit": [(re.compile(r"^enable_jit_fuser\(\)$", re.M), "disable_jit_fuser()")],
}
_TOUCHED = re.compile(
    r"megatron\.core\.(jit|utils|parallel_state|timers|tensor_parallel\..*|"
    r"pipeline_parallel\.(schedules|p2p_communication)|optimizer\.(optimizer|distrib_optimizer|clip_grads|grad_scaler)|"
    r"distributed\.(param_and_grad_buffer|distributed_data_parallel|finalize_model_grads)|"
    r"transformer\.(utils|attention|dot_product_attention|transformer_layer|module)|"
    r"models\.(gpt\.gpt_model|common\.language_module\..*|common\.embeddings\..*))$"
)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        source = importlib.util.decode_source(self.get_data(path))
        rewritten = source
        for pattern, replacement in _RULES + _BY_MODULE.get(fullname, []):
            rewritten = pattern.sub(replacement, rewritten)
        if rewritten == source:
            return super().get_code(fullname)
        return compile(rewritten, path, "exec", dont_inherit=True)  # never into __pycache__: the file on disk is unchanged


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _TOUCHED.match(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> bool:
    """Make megatron-core importable and runnable on CPU. True when the hook is active, False on a CUDA machine.

    Raises UserError when the installed megatron-core is not the pinned one, RuntimeError when it was imported before.
    """
    if usable():
        return False
    if any(isinstance(f, _Finder) for f in sys.meta_path):
        return True
    version = importlib.metadata.version("megatron-core")
    if version != PINNED:
        raise UserError(
            f"megatron-core {version} is installed, but running without CUDA needs {PINNED}: pip install megatron-core=={PINNED}"
        )
    early = [m for m in list(sys.modules) if m.startswith("megatron.core")]  # a copy: another thread may be importing
    if early:
        raise RuntimeError(f"megatron.core was imported before the CPU hook was installed ({early[0]})")
    sys.meta_path.insert(0, _Finder())
    return True


# Megatron says at every import that Transformer Engine and Apex are absent, and calls collectives that torch has since renamed.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
install()
