"""The SGLang engine for tests: where its environment is, and a small server on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.data.tokenizer import load_tokenizer
from rlinf.errors import UserError
from rlinf.rollout.sglang_engine import SGLangEngine
from rlinf.rollout.sglang_options import ServerSettings
from rlinf.rollout.sglang_server import find_interpreter


def missing() -> str | None:
    try:
        find_interpreter(None, cuda=False)
    except UserError as error:
        return str(error)
    return None


REASON = missing()
needs_sglang = (pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON)))


def small_server(model_dir: Path, max_context: int, native: dict[str, str] | None = None, tensor_parallel_size: int = 1) -> SGLangEngine:
    log = model_dir.parent / "sglang.log"
    settings = ServerSettings(
        str(model_dir),
        dtype="fp32",
        slots=4,
        max_context=max_context,
        seed=7,
        tensor_parallel_size=tensor_parallel_size,
        native=native or {},
    )
    return SGLangEngine(settings, log=log, run_id=f"test-{model_dir.parent.name}", decode=load_tokenizer(str(model_dir)).decode)
