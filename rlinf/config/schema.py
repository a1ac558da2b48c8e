"""The configuration: one dataclass for each YAML section; `algorithm`, `validation` and `evaluation` have files of their own.
Field metadata: field.py.

A key that nothing reads, and a default that is not defined here, are defects. The names of keys are those that users of RLinf know.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING

from rlinf.config.algorithm import AlgorithmConfig
from rlinf.config.benchmarks import EvaluationConfig, ValidationConfig
from rlinf.config.field import key

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MEGATRON_ROLES = ("actor", "critic", "token_reward")  # the components whose ranks are Megatron's: each has a section with a `model`


@dataclass
class ClusterConfig:
    backend: str = key(
        "ray",
        "where workers live: `ray` (local cluster when none is up) or `local` (everything in this process, for debugging)",
        ("ray", "local"),
    )
    num_nodes: int = key(1, "number of nodes; the run waits for them", at_least=1)
    num_gpus_per_node: int = key(1, "devices per node: GPUs, or process slots on a CPU machine", at_least=1)
    component_placement: dict[str, str] = key(
        {"actor,rollout,reward": "all"}, "component[,component]: devices, as `all`, `0-7`, `0-3,8`; devices are numbered node by node"
    )
    device: str = key("auto", "`cuda`, `cpu`, or `auto` (cuda when the machine has it)", ("auto", "cuda", "cpu"))
    threads_per_worker: int = key(
        0, "compute threads of an actor or rollout process on CPU; 0 = cores of the node / device slots of the node, at least 1", at_least=0
    )
    start_timeout: int = key(600, "seconds to wait for nodes and for workers to start", at_least=1)


@dataclass
class LoggerConfig:
    logger_backends: list[str] = key(
        ["tensorboard"],
        "metric writers besides metrics.jsonl; the others need their package and an account or server of yours",
        ("tensorboard", "wandb", "swanlab", "mlflow"),
    )
    project_name: str = key("rlinf", "project (MLflow: experiment) under which wandb, swanlab and mlflow file the run")


@dataclass
class RunnerConfig:
    output_dir: str = key("./logs", "runs are written to <output_dir>/<experiment_name>")
    experiment_name: str = key("rlinf", "name of the run and of its folder")
    max_epochs: int = key(1, "passes over the training data", at_least=1)
    max_steps: int = key(-1, "stop after this many steps; -1 = by max_epochs alone")
    val_check_interval: int = key(
        -1, "steps between validations on data.val_data_paths; -1 = only before the first and after the last step; 0 = never", at_least=-1
    )
    save_interval: int = key(-1, "steps between checkpoints; -1 = only after the last step; 0 = never", at_least=-1)
    async_checkpoint: bool = key(
        False, "write checkpoints in the background while training goes on; needs host memory for a copy of weights and optimizer state"
    )
    keep_checkpoints: int = key(2, "how many complete checkpoints are kept, the newest ones; 0 = all", at_least=0)
    keep_best: bool = key(
        True,
        "also keep the checkpoint with the best held-out score (eval/accuracy, of `rlinf sft` sft/val_loss) of those whose step was "
        "validated; checkpoints/best leads to it",
    )
    keep_groups: int = key(
        50,
        "last steps whose groups (token ids, log-probabilities, verdicts: 11 bytes a token) are kept in samples/ for `rlinf replay`; step "
        "1 and the step after each kept checkpoint are kept as well; -1 = all; 0 = none are written",
        at_least=-1,
    )
    resume_dir: str | None = key(
        None,
        "null = a new run; `auto` = go on from this run's latest checkpoint; or the path of a step_* folder, `latest` or `best`",
    )
    phase_timeout: int = key(
        0,
        "seconds that a phase of a step may take before the run counts as hanging; "
        "0 = ten times the longest such phase so far, at least 600; -1 = no limit",
        at_least=-1,
    )
    on_hang: str = key(
        "abort",
        "what a hang does, after the diagnosis: `abort` ends the run, `restart` ends the workers and goes on from the latest complete "
        "checkpoint (without one it is an abort), `report` lets it go on",
        ("abort", "restart", "report"),
    )
    max_restarts: int = key(3, "with on_hang restart: how often one command restarts the run at most", at_least=1)
    profile_steps: list[int] = key(
        [], "steps that torch's profiler records, into profile/ of the run's folder; a trace slows its step down"
    )
    profile_ranks: list[int] = key([0], "ranks of actor, critic and rollout that are recorded")
    peak_tflops: float | None = key(
        None,
        "peak of a device in 10^12 operations a second, for the utilisation metrics; null = the data sheet's, on CPU none",
        more_than=0,
    )
    seq_length: int = key(2048, "tokens of prompt + response at most", at_least=2)
    max_tokens_per_mbs: int = key(4096, "token budget of a training micro-batch; at least seq_length")
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def run_dir(self) -> Path:
        """The folder of the run, absolute: everything that a run writes is in it."""
        return Path(self.output_dir).expanduser().resolve() / self.experiment_name


@dataclass
class DataConfig:
    train_data_paths: list[str] = key([], "JSONL files in the AReaL-boba format")
    val_data_paths: list[str] = key(
        [], "JSONL files for validation; where `rlinf train` has several, each has curves of its own, eval/<metric>/<file>"
    )
    prompt_key: str = key("prompt", "field of the prompt")
    answer_key: str = key("solutions", "field of the accepted answers")
    apply_chat_template: bool = key(
        False, "wrap the prompt as a user turn in the tokenizer's chat template (boba prompts are templated already)"
    )
    chat_template_variables: dict[str, str] = key(
        {}, "variables for the chat template, such as {enable_thinking: false} for Qwen3; `rlinf eval` uses them, too"
    )
    tasks: list[str] | None = key(None, "keep only these tasks; null = all")
    max_prompt_length: int = key(1024, "tokens of a prompt at most", at_least=1)
    filter_prompt_by_length: bool = key(True, "drop longer prompts (counted); false = a longer prompt is an error")
    rollout_batch_size: int = key(512, "prompts per step", at_least=1)
    shuffle: bool = key(True, "new order every epoch, from the seed")
    seed: int = key(1234, "seed of the data order", at_least=0, less_than=2**63)  # above it numpy no longer tells two seeds apart
    on_bad_record: str = key("error", "`error`: refuse to start, naming file and lines; `skip`: drop, count and report", ("error", "skip"))


@dataclass
class RolloutConfig:
    model_dir: str = key(MISSING, "local Hugging Face folder: config.json, *.safetensors, tokenizer; Qwen2/2.5, Qwen3, Qwen3-MoE or Llama")
    trust_remote_code: bool = key(False, "let the tokenizer run code from the model folder")
    rollout_backend: str = key("sglang", "rollout engine", ("embedded", "sglang"))
    sglang: dict[str, str] = key(
        {}, "SGLang's own server options by their full names with underscores, such as {attention_backend: triton}; see docs/sglang.md"
    )
    sglang_python: str | None = key(
        None, "python interpreter that has sglang; null = the run's own if it has it, on CPU else the one of toolkits/setup/sglang_cpu.sh"
    )
    tensor_parallel_size: int = key(
        1,
        "GPUs of one engine; the embedded engine runs on one device, one of SGLang also on those of several nodes (docs/sglang.md)",
        at_least=1,
    )
    gpu_memory_utilization: float = key(
        0.55,
        "share of a GPU's memory for the engine's weights and KV cache; with SGLang of the memory that is free when the engine starts",
        more_than=0,
        less_than=1,
    )
    offload: bool = key(
        False,
        "give the engine's weights and KV cache back while the actor trains on the same device; SGLang then runs with enable_memory_saver",
    )
    max_running_requests: int = key(64, "samples decoded at once by one engine", at_least=1)
    precision: str | None = key(
        None,
        "dtype of the engine's weights and KV cache; auto as for actor.model.precision; null = the actor's",
        (None, "fp32", "bf16", "fp16", "auto"),
    )
    seed: int = key(1234, "seed of the sampling noise", at_least=0)
    partial: bool = key(
        False, "with schedule wallclock: engines stop while the actor trains, and unfinished groups are carried over with their tokens"
    )
    max_engine_restarts: int = key(
        3,
        "how many engines that died are restarted with the current weights (which the actor keeps for that) before a death ends the run; "
        "Ray only",
        at_least=0,
    )
    stall_timeout: int = key(
        0,
        "seconds without a finished group, or without an answer to another call, after which an engine is ended and restarted; 0 = never",
        at_least=0,
    )
    over_provisioning: float = key(
        0.0,
        "with schedule wallclock: how many batches of groups may be begun and not yet trained on; 0 = as many as max_staleness allows",
        at_least=0,
    )
    weight_transport: str = key(
        "auto",
        "how weights reach the engines: `auto` (shared memory on a node, Ray's object store between nodes), `disk` (safetensors files in "
        "the run's folder), `broadcast` (a process group of each publisher and its engines, or the ranks of their SGLang servers: gloo, "
        "NCCL between GPUs) or `device_ipc` (on the device that an engine shares with the actor)",
        ("auto", "disk", "broadcast", "device_ipc"),
    )
    weight_bucket_mib: int = key(
        128, "MiB of weights that are gathered, copied and sent at a time; a tensor that is larger goes by itself", at_least=1
    )
    verify_weights_every: int = key(
        50, "probe the engine against the actor at the first and at every k-th weight sync; 0 = only at the first", at_least=0
    )

    @property
    def joins_groups(self) -> bool:
        """Whether the ranks of an engine are members of broadcast groups themselves; else its worker is in their place."""
        return self.rollout_backend == "sglang"


@dataclass
class ActorModelConfig:
    tensor_model_parallel_size: int = key(1, "ranks that share each layer", at_least=1)
    pipeline_model_parallel_size: int = key(1, "pipeline stages", at_least=1)
    sequence_parallel: bool = key(False, "shard norms and residuals over the tensor-parallel ranks; needs tensor_model_parallel_size > 1")
    context_parallel_size: int = key(
        1, "ranks that share the tokens of each micro-batch; for sequences whose activations do not fit one rank", at_least=1
    )
    precision: str = key(
        "bf16",
        "compute dtype; master weights, moments and gradients are fp32; auto = bf16 on a GPU and on a CPU with bf16 instructions, else "
        "fp32, by the machine that starts the run",
        ("fp32", "bf16", "fp16", "auto"),
    )
    transformer_impl: str = key(
        "auto",
        "modules of the layers; auto = Transformer Engine's in 16 bits on a GPU where it is installed and Triton has what it needs, "
        "else local",
        ("auto", "transformer_engine", "local"),
    )
    recompute_granularity: str | None = key(None, "activation recompute: `full`, `selective` or null", (None, "full", "selective"))
    recompute_method: str | None = key(
        None, "with `full`: `block` (the first recompute_num_layers of a stage) or `uniform`", (None, "block", "uniform")
    )
    recompute_num_layers: int | None = key(None, "with `full`: layers to recompute (block) or per chunk (uniform)")

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage that work on the same samples. Rank order: TP fastest, then CP, then DP, then PP."""
        return self.tensor_model_parallel_size * self.context_parallel_size

    @property
    def copy_ranks(self) -> int:
        """Ranks that hold one copy of the model, or one data-parallel rank of a training batch."""
        return self.stage_ranks * self.pipeline_model_parallel_size

    def data_parallel_size(self, ranks: int) -> int:
        """Copies of the model, or shares of a batch, when it lies over so many ranks."""
        return ranks // self.copy_ranks

    def data_parallel_rank(self, rank: int, ranks: int) -> int:
        """Which copy `rank` holds a part of: which share of a batch it works on."""
        return rank // self.stage_ranks % self.data_parallel_size(ranks)


@dataclass
class OptimConfig:
    lr: float = key(2e-5, "peak learning rate", at_least=0)
    min_lr: float = key(0.0, "learning rate at the end of a linear or cosine decay", at_least=0)
    lr_decay_style: str = key("constant", "schedule after warm-up", ("constant", "linear", "cosine"))
    lr_decay_steps: int = key(0, "optimizer steps of warm-up + decay; needed for linear and cosine", at_least=0)
    lr_warmup_steps: int = key(0, "optimizer steps of linear warm-up from 0", at_least=0)
    adam_beta1: float = key(0.9, "Adam beta 1", at_least=0, less_than=1)
    adam_beta2: float = key(0.95, "Adam beta 2", at_least=0, less_than=1)
    adam_eps: float = key(1e-5, "Adam epsilon", more_than=0)
    weight_decay: float = key(0.05, "decoupled weight decay; not applied to norms and biases", at_least=0)
    clip_grad: float = key(1.0, "global gradient norm; 0 = no clipping", at_least=0)
    loss_scale: float | None = key(None, "static loss scale for fp16; null = dynamic", more_than=0)
    initial_loss_scale: float = key(65536.0, "start of the dynamic loss scale", at_least=1)  # Megatron's scaler goes no lower
    loss_scale_window: int = key(1000, "good steps before the dynamic loss scale doubles", at_least=1)


@dataclass
class LoraConfig:
    """Low-rank adapters, arXiv 2106.09685: the weights W stay as they are, and A and B of W + alpha / rank · B A are trained."""

    rank: int = key(0, "rows of A and columns of B; 0 = no adapters, all weights are trained", at_least=0)
    alpha: float = key(32.0, "scale of the adapters: what they add is multiplied by alpha / rank", more_than=0)
    target_modules: list[str] = key(
        list(LORA_TARGETS),
        "matrices of a layer that have adapters, by Megatron's names: linear_qkv (query, key, value), linear_proj (attention's output), "
        "linear_fc1 (gate and up), linear_fc2 (down)",
        LORA_TARGETS,
    )
    seed: int = key(1234, "seed of the first A; B begins with zeros", at_least=0)


@dataclass
class ActorConfig:
    model: ActorModelConfig = field(default_factory=ActorModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    offload_weight: bool = key(False, "move weights to host memory while the engine generates on the same GPU")
    offload_grad: bool = key(False, "free gradients while the engine generates on the same GPU")
    offload_optimizer: bool = key(False, "move optimizer state to host memory while the engine generates on the same GPU")


@dataclass
class CriticConfig(ActorConfig):
    """Used only with algorithm.adv_type: gae."""

    model_dir: str | None = key(
        None, "Hugging Face folder that the critic starts from, of a model with the actor's vocabulary; null = rollout.model_dir"
    )
    seed: int = key(1234, "seed of the value head's first weights (`score.weight`), where the folder has none", at_least=0)
    value_clip: float | None = key(
        0.5,
        "clip range of the values: how far a value may move in one step before its loss stops falling, in units of reward; null = no limit",
        more_than=0,
    )
    warmup_steps: int = key(0, "first steps of the run in which the critic alone is trained", at_least=0)


@dataclass
class TokenRewardConfig:
    """A frozen model that scores every token of a response, such as a process reward model or a teacher. The run has one when model_dir is
    set."""

    model_dir: str | None = key(
        None,
        "Hugging Face folder of a token (or sequence) classification model with the actor's vocabulary and one label, "
        "or two (wrong, right), or of a teacher; null = there is none",
    )
    output: str = key(
        "logit",
        "score of a token: the logit (of two labels their difference), or its sigmoid; of a `teacher`, a language model, "
        "log(its probability of the token / the policy's)",
        ("logit", "probability", "teacher"),
    )
    reduce: str = key("mean", "how the scores of a response's tokens become the score of the response", ("mean", "sum", "last", "min"))
    weight: float = key(1.0, "factor of a score before it is added to the reward", more_than=0)
    model: ActorModelConfig = field(default_factory=ActorModelConfig)
    offload_weight: bool = key(False, "keep its weights in host memory while it does not score")


@dataclass
class RewardConfig:
    reward_type: str = key("math", "verifier", ("math",))
    own_tasks: dict[str, str] = key(
        {}, "tasks that functions of yours judge: name of the task in the data -> `path/to/file.py:function`", own=True
    )
    own_parts: dict[str, str] = key(
        {},
        "numbers that functions of yours add to the reward of a response: name of the part -> `path/to/file.py:function`; "
        "correctness stays the verifier's",
        own=True,
    )
    own_group_parts: dict[str, str] = key(
        {},
        "as own_parts, of functions that are given all responses to a problem at once and return a number for each, such as a comparison "
        "or a judge on another machine",
        own=True,
    )
    own_timeout: float | None = key(None, "seconds of one call of a function of yours; null = reward.timeout", more_than=0)
    reward_scale: float = key(
        5.0, "reward of a right answer; a wrong one gets the negative; 0 = reward.own_parts and reward.own_group_parts alone", at_least=0
    )
    undecided_reward: float | None = key(None, "reward of an undecided answer; null = as wrong")
    answer_format: str = key(
        "boxed",
        "where the answer is: in the last complete box, or, without a box, also in the last number",
        ("boxed", "boxed_or_final_number"),
    )
    num_processes: int = key(
        1,
        "verifier processes of one reward worker, for answers that need symbolic computation; and as many of each function of yours",
        at_least=1,
    )
    timeout: float = key(1.0, "seconds of one symbolic comparison before it is killed and counted as undecided", more_than=0)
    format_reward: float = key(0.0, "added when the response closes its thinking once and boxes an answer after it; 0 = off", at_least=0)
    four_levels: bool = key(
        False,
        r"RaML's reward, times reward_scale: 1 right and well-formed, 0 wrong and well-formed, −0.5 right, −1 neither; well-formed is "
        r"`<think>…</think><conclusion>…\boxed{}…</conclusion>`",
    )
    overlong_buffer: int = key(
        0, "tokens before max_new_tokens in which a length penalty grows linearly (DAPO soft overlong); 0 = off", at_least=0
    )
    overlong_penalty: float = key(1.0, "length penalty of a response of max_new_tokens, with overlong_buffer > 0", at_least=0)
    exploration_penalty: float = key(0.0, "c of the penalty min(1, c / response tokens) for short responses (RLSP); 0 = off", at_least=0)

    def of_verdicts(self) -> RewardConfig:
        """The same without what is paid besides right and wrong."""
        return replace(
            self, own_parts={}, own_group_parts={}, format_reward=0.0, four_levels=False, overlong_buffer=0, exploration_penalty=0.0
        )

    @property
    def seconds_of_own(self) -> float:
        """What one call of a function of the user's own may take."""
        return self.timeout if self.own_timeout is None else self.own_timeout


@dataclass
class SftConfig:
    batch_size: int = key(64, "examples per optimizer step, over all data-parallel ranks", at_least=1)
    response_key: str = key("response", "field of the response; the loss is on its tokens alone")
    append_end_token: bool = key(True, "end each response with the model's end token, unless it ends with one")
    reweighting: str | None = key(
        None,
        "weight each example by its own loss within the batch (arXiv 2502.06733), the mean of examples instead of tokens; "
        "null = mean over all response tokens; it costs another forward pass",
        (None, "uniform", "lin_upper", "quadratic", "extremes", "upper"),
    )
    reweighting_temperature: float = key(1.0, "softmax temperature of the weights; larger = more even", more_than=0)
    reweighting_burn_in: int = key(0, "first steps in which all examples weigh the same", at_least=0)


@dataclass
class Config:
    """The whole configuration."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    token_reward: TokenRewardConfig = field(default_factory=TokenRewardConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    @property
    def placed(self) -> frozenset[str]:
        """The components that cluster.component_placement names."""
        return frozenset(name.strip() for names in self.cluster.component_placement for name in names.split(","))

    @property
    def trains_alone(self) -> bool:
        """Whether only the actor is placed, as for `rlinf sft`: nothing is generated or judged."""
        return self.placed == {"actor"}

    @property
    def has_critic(self) -> bool:
        return self.algorithm.adv_type == "gae"

    @property
    def has_token_reward(self) -> bool:
        return self.token_reward.model_dir is not None

    def has(self, component: str) -> bool:
        """Whether the run has the component; all but critic and token reward model are always there."""
        return {"critic": self.has_critic, "token_reward": self.has_token_reward}.get(component, True)

    @property
    def megatron_roles(self) -> tuple[str, ...]:
        """Those of MEGATRON_ROLES that this run has; the first is the actor."""
        return tuple(role for role in MEGATRON_ROLES if self.has(role))

    def model_dir_of(self, role: str) -> str:
        """The Hugging Face folder from which one of megatron_roles starts."""
        own = None if role == "actor" else getattr(self, role).model_dir
        return own or self.rollout.model_dir

    def head_of(self, role: str) -> str:
        """What the model of one of megatron_roles outputs: `lm`, log-probabilities of tokens, or `scalar`, one number for each token."""
        return "lm" if role == "actor" or (role == "token_reward" and self.token_reward.output == "teacher") else "scalar"

    @property
    def engine_restarts(self) -> int:
        """How many deaths of engines the run survives: none where engines have no process of their own."""
        return self.rollout.max_engine_restarts if self.cluster.backend == "ray" else 0

    def trains_actor(self, step: int) -> bool:
        """Whether the actor is trained in this step: not while a critic warms up."""
        return not self.has_critic or step > self.critic.warmup_steps
