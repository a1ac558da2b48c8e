"""What tests of several rooms share: one pool of training ranks (its start costs seconds of imports) and tiny models."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def rank_pool() -> Iterator["RankPool"]:  # noqa: F821  (imported when a test asks for it)
    """Four training ranks on gloo; see rlinf.checks.rank_pool."""
    from rlinf.checks.rank_pool import RankPool

    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a tiny random fp32 model by family."""
    from rlinf.checks.tiny_model import FAMILIES, write_tiny_model

    folder = tmp_path_factory.mktemp("tiny-models")
    return {family: write_tiny_model(folder / family, family) for family in FAMILIES}
