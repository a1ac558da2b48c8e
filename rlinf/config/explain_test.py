"""A key explains itself; docs/config.md is what the schema says."""

from __future__ import annotations

import pytest

from rlinf.config.explain import explain, reference
from rlinf.config.keys import known_keys
from rlinf.config.load import ROOT, load
from rlinf.errors import UserError


def test_the_reference_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == reference(), "run: python -m rlinf.config.explain > docs/config.md"


def test_every_key_has_a_meaning_and_its_default_is_one_of_its_choices() -> None:
    for key in known_keys().values():
        assert len(key.help) > 5, key.name
        if key.choices:
            assert all(d in key.choices for d in (key.default if isinstance(key.default, list) else [key.default])), key.name


def test_explain_tells_meaning_type_default_choices_value_and_origin() -> None:
    text = explain(load("grpo-7b-megatron", ["algorithm.adv_type=rloo"]), "algorithm.adv_type")
    for word in ("advantage estimator", "type     text", "default  grpo", "choices  grpo, rloo", "value    rloo", "set by   command line"):
        assert word in text
    text = explain(load("grpo-7b-megatron"), "algorithm.group_size")
    assert "value    32" in text and "qwen2.5-7b-grpo-megatron.yaml:" in text
    assert "value" not in explain(None, "algorithm.group_size")
    assert "none: it must be set" in explain(None, "rollout.model_dir")
    assert "type     number > 0, ≤ 1\n" in explain(None, "algorithm.gae_lambda")
    assert "type     number > 0 or null\n" in explain(None, "critic.value_clip")


def test_a_section_lists_its_keys() -> None:
    text = explain(None, "actor")
    assert "actor.optim.lr " in text and "actor.model.tensor_model_parallel_size" in text


def test_explaining_an_unknown_or_dropped_key_says_so() -> None:
    with pytest.raises(UserError, match="did you mean runner.max_steps"):
        explain(None, "runner.maxsteps")
    with pytest.raises(UserError, match="use rollout.model_dir"):
        explain(None, "rollout.model.model_path")
