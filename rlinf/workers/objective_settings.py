"""Translates the section `algorithm` into the settings of the policy loss and of token-level advantages."""

from __future__ import annotations

from rlinf.algorithms.importance import Correction
from rlinf.algorithms.objective import ObjectiveSettings
from rlinf.algorithms.token_advantages import TokenAdvantageSettings
from rlinf.config.algorithm import AlgorithmConfig
from rlinf.config.own_code import own_function


def objective_settings(algorithm: AlgorithmConfig) -> ObjectiveSettings:
    """The settings of the policy loss. A loss of the user's own is loaded."""
    eps = algorithm.ratio_clip_eps
    return ObjectiveSettings(
        loss_type=algorithm.loss_type,
        loss_agg_func=algorithm.loss_agg_func,
        clip_low=eps if algorithm.clip_ratio_low is None else algorithm.clip_ratio_low,
        clip_high=eps if algorithm.clip_ratio_high is None else algorithm.clip_ratio_high,
        clip_c=algorithm.clip_ratio_c,
        kl_beta=algorithm.kl_beta if algorithm.kl_in == "loss" else 0.0,
        kl_penalty_type=algorithm.kl_penalty_type,
        entropy_bonus=algorithm.entropy_bonus,
        correction=correction_of(algorithm),
        max_new_tokens=algorithm.sampling_params.max_new_tokens,
        own_loss=own_function(algorithm.loss_type),
    )


def token_advantage_settings(algorithm: AlgorithmConfig) -> TokenAdvantageSettings | None:
    """The settings of token-level advantages; None when the driver's advantages are final."""
    normalize_by = correction_of(algorithm) if algorithm.importance_sampling_normalize else None
    if not algorithm.token_level and normalize_by is None:
        return None
    return TokenAdvantageSettings(
        gamma=algorithm.gamma,
        kl_beta=algorithm.kl_beta if algorithm.kl_in == "reward" else 0.0,
        kl_penalty_type=algorithm.kl_penalty_type,
        whiten=algorithm.token_level and algorithm.normalize_advantages,  # else the driver has done it
        normalize_by=normalize_by,
        gae_lambda=algorithm.gae_lambda,
    )


def correction_of(algorithm: AlgorithmConfig) -> Correction | None:
    """The correction for the difference between actor and engine; None = token losses are not weighted."""
    if algorithm.loss_type == "decoupled-ppo":
        return Correction("token-mask", 0.0, algorithm.behav_imp_weight_cap)
    if not algorithm.importance_sampling_fix:
        return None
    high, low = algorithm.importance_sampling_clip, algorithm.importance_sampling_low
    return Correction(algorithm.importance_sampling_type, 1 / high if low is None else low, high)
