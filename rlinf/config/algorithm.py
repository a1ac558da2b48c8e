"""The section `algorithm` of the configuration: how a response is sampled, judged against others, and learnt from."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlinf.config.field import key
from rlinf.config.own_code import is_own


@dataclass
class SamplingConfig:
    do_sample: bool = key(True, "true; greedy answers of one prompt are all equal, so false is refused")
    temperature: float = key(1.0, "softmax temperature of rollouts; log-probabilities use it on both sides", more_than=0)
    top_k: int = key(1000000, "sample among the k most likely tokens; 0 or at least the vocabulary = off", at_least=0)
    top_p: float = key(1.0, "sample from the smallest set with this probability mass; 1 = off", more_than=0, at_most=1)
    max_new_tokens: int = key(1024, "tokens of a response at most", at_least=1)
    stop: list[str] = key([], "strings that end a response, besides the end token")


@dataclass
class AlgorithmConfig:
    group_size: int = key(8, "responses per prompt", at_least=1)
    n_minibatches: int = key(1, "optimizer steps per global batch and pass over it; divides rollout_batch_size * group_size", at_least=1)
    update_epochs: int = key(
        1, "passes over the samples of a step, of actor and critic; mini-batches and old policy stay the same", at_least=1
    )
    adv_type: str = key("grpo", "advantage estimator", ("grpo", "rloo", "dr_grpo", "reinforce++", "reinforce++-baseline", "gae"), own=True)
    gamma: float = key(
        1.0,
        "discount of a reward for each token between it and the token that is credited; 1 = none, 0 = each token has its own alone",
        at_least=0,
        at_most=1,
    )
    gae_lambda: float = key(1.0, "λ of adv_type gae: 1 = the return minus the value; less trusts the critic more", more_than=0, at_most=1)
    normalize_advantages: bool = key(True, "whiten advantages once over all response tokens of the global batch")
    loss_type: str = key("ppo", "policy loss", ("ppo", "decoupled-ppo", "gspo", "gspo-token", "cispo"), own=True)
    loss_agg_func: str = key(
        "token-mean",
        "how token losses become the loss",
        ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    )
    kl_beta: float = key(0.0, "weight of the KL term against the initial policy; 0 = no reference policy is kept", at_least=0)
    kl_in: str = key("loss", "where the KL term acts: added to the loss, or taken from the reward of each token", ("loss", "reward"))
    kl_penalty_type: str = key("k3", "KL estimator", ("k1", "k2", "k3"))
    ratio_clip_eps: float = key(0.2, "clip range of the importance ratio when clip_ratio_low/high are null", more_than=0)
    clip_ratio_low: float | None = key(None, "lower clip range; null = ratio_clip_eps", more_than=0)
    clip_ratio_high: float | None = key(None, "upper clip range; null = ratio_clip_eps", more_than=0)
    clip_ratio_c: float | None = key(None, "dual-clip constant for negative advantages; null = off", more_than=1)
    entropy_bonus: float = key(0.0, "weight of the token entropy in the objective", at_least=0)
    early_stop_imp_ratio: float | None = key(
        5.0, "skip the optimizer step of a mini-batch whose token-mean importance ratio exceeds this or is NaN; null = off", more_than=1
    )
    recompute_logprobs: bool = key(
        True,
        "old log-probabilities from the actor (true) or as reported by the rollout engine (false; decoupled-ppo then interpolates π_prox)",
    )
    importance_sampling_fix: bool = key(False, "truncated importance sampling between rollout engine and actor; needs recompute_logprobs")
    importance_sampling_type: str = key(
        "token-truncate",
        "what the importance weight is bounded by: each token's ratio, the product or geometric mean of its response's, or the mean k3; "
        "`truncate` cuts the weight off at the bound, `mask` sets it to 0 outside the bounds",
        ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask", "geometric-truncate", "geometric-mask", "k3-mask"),
    )
    importance_sampling_clip: float = key(2.0, "upper bound of the importance weight (of the mean k3 for k3-mask)", more_than=0)
    importance_sampling_low: float | None = key(
        None, "lower bound of the -mask types but k3-mask; null = 1 / importance_sampling_clip", at_least=0
    )
    importance_sampling_normalize: bool = key(
        False, "divide the importance weights by their mean over all response tokens of the global batch"
    )
    behav_imp_weight_cap: float = key(5.0, "decoupled-ppo: a token whose weight π_prox/μ exceeds this has loss 0", more_than=0)
    overlong_filtering: bool = key(False, "leave responses that were cut off (by max_new_tokens or the context window) out of the loss")
    num_update_sample_per_prompt: int | None = key(
        None,
        "train on this many responses of each prompt, chosen at random from data.seed; advantages are those of all; null = all",
        at_least=1,
    )
    dynamic_sampling: bool = key(
        False, "train on groups with both right and wrong answers only, generating until rollout_batch_size are there"
    )
    dynamic_sampling_batch_size: int | None = key(
        None, "with dynamic_sampling and schedule logical: prompts generated at a time; null = data.rollout_batch_size", at_least=1
    )
    dynamic_sampling_max_batches: int = key(
        10, "with dynamic_sampling: such batches a step may take at most; needing more is an error", at_least=1
    )
    max_staleness: int = key(
        0, "how many versions of the weights generation may run ahead of training (η); 0 = each step waits for its own groups", at_least=0
    )
    schedule: str = key(
        "logical",
        "`logical`: reproducible, a batch is generated under one version; "
        "`wallclock`: groups begin and are trained on as soon as max_staleness allows",
        ("logical", "wallclock"),
    )
    dense_rewards: bool = key(
        False,
        "each token is paid its own score of the token reward model (adv_type gae or reinforce++); "
        "false = a response is paid token_reward.reduce",
    )
    shuffle_rollout: bool = key(False, "shuffle samples before the mini-batch split, from the data seed and the step")
    sampling_params: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def interpolates_proximal(self) -> bool:
        """Whether π_prox comes from the versions of the weights and not from a forward pass."""
        return self.loss_type == "decoupled-ppo" and not self.recompute_logprobs

    @property
    def token_level(self) -> bool:
        """Whether advantages differ from token to token:
        the driver then knows only the outcome, and the actor finishes (and whitens) them."""
        return self.kl_in == "reward" or self.gamma != 1 or self.adv_type == "gae" or self.dense_rewards

    @property
    def zero_teaches(self) -> bool:
        """Whether a response with advantage 0 can be in the gradient: by a term of the loss besides the policy's, by advantages that are
        finished token by token, or by a loss that is not ours."""
        return self.kl_beta > 0 or self.entropy_bonus != 0 or self.token_level or is_own(self.loss_type)
