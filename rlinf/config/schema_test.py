"""Which Megatron roles a run has, and what model each of them starts from."""

from __future__ import annotations

from dataclasses import replace

from rlinf.config.algorithm import AlgorithmConfig
from rlinf.config.schema import MEGATRON_ROLES, Config, TokenRewardConfig
from rlinf.scheduling.placement import COMPONENTS


def test_a_run_has_the_roles_that_its_settings_ask_for() -> None:
    config = Config()
    assert config.megatron_roles == ("actor",)
    config.token_reward.model_dir = "/scorer"
    assert config.megatron_roles == ("actor", "token_reward")
    config.algorithm.adv_type = "gae"
    assert config.megatron_roles == MEGATRON_ROLES and set(COMPONENTS) - set(MEGATRON_ROLES) == {"rollout", "reward"}


def test_a_role_without_a_folder_of_its_own_starts_from_the_actors() -> None:
    config = Config()
    config.rollout.model_dir, config.token_reward.model_dir = "/policy", "/scorer"
    assert [config.model_dir_of(role) for role in MEGATRON_ROLES] == ["/policy", "/policy", "/scorer"]
    config.critic.model_dir = "/values"
    assert config.model_dir_of("critic") == "/values"
    assert [Config().head_of(role) for role in MEGATRON_ROLES] == ["lm", "scalar", "scalar"]
    teacher = Config(token_reward=TokenRewardConfig(output="teacher"))
    assert [teacher.head_of(role) for role in MEGATRON_ROLES] == ["lm", "scalar", "lm"]


def test_where_nothing_else_is_in_the_loss_an_advantage_of_zero_has_no_gradient() -> None:
    plain = AlgorithmConfig()
    assert not plain.zero_teaches and not replace(plain, loss_type="gspo", adv_type="own.py:advantages").zero_teaches
    for other in ({"kl_beta": 0.1}, {"entropy_bonus": -0.1}, {"gamma": 0.9}, {"adv_type": "gae"}, {"loss_type": "own.py:loss"}):
        assert replace(plain, **other).zero_teaches, other
