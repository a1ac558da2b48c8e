"""`rlinf check layout`: however a step is split, it is the same step.

Two optimizer steps on tiny random models of every family, in layouts over TP x CP x PP x DP x sequence parallelism x micro-batch split x
shared prefix x sample order x number of ranks, of a policy and of a critic, against plain transformers on one sample at a time: loss,
metrics, values, the gradient of every parameter, its norm, and the weights after the steps. fp32; nothing is normalised away (see
layout_reference). Activations are kept or recomputed, in turn.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import tempfile
import time
from collections import ChainMap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.objective import finalize_metrics
from rlinf.algorithms.values import finalize_value_metrics
from rlinf.checks.layout_reference import (
    LORA,
    OPTIM,
    SETTINGS,
    TEMPERATURE,
    VALUE_SETTINGS,
    Batch,
    Expected,
    Step,
    first_adapter,
    make_batch,
    plain_steps,
)
from rlinf.checks.rank_pool import RankPool
from rlinf.checks.tiny_model import FAMILIES, VOCAB, write_tiny_model
from rlinf.config.schema import ActorModelConfig, LoraConfig
from rlinf.data.packing import build_rank_batches
from rlinf.training.engine import MegatronEngine
from rlinf.training.experts import load_metrics
from rlinf.training.packed_batch import by_sample, pack
from rlinf.training.parallel import Coordinates
from rlinf.weights.architecture import open_architecture
from rlinf.weights.tensor_folder import open_hf_folder

RANKS = 4
COMPLAINTS = 5  # failing layouts that are described; the table shows them all
LOSS_TOLERANCE = 1e-6  # of mean |advantage|; of the loss itself, a sum of squares, for a critic
GRADIENT_TOLERANCE = 1e-5  # of max(||g||, 1e-3 ||g_all||), for every tensor
NORM_TOLERANCE = 1e-5  # relative
METRIC_TOLERANCE = 1e-5  # relative to max(1, |metric|)
WEIGHT_TOLERANCE = 1e-5  # of max(||step||, 1e-3 ||step_all||), for every tensor, beside one rounding of the weights
ROUNDING = 2.0**-23

LAYOUTS = [  # ranks, TP, PP, sequence parallel
    (1, 1, 1, False),
    (2, 1, 1, False), (2, 2, 1, False), (2, 2, 1, True), (2, 1, 2, False),
    (3, 1, 1, False),
    (4, 1, 1, False), (4, 2, 1, False), (4, 2, 1, True), (4, 1, 2, False), (4, 2, 2, False), (4, 2, 2, True), (4, 1, 4, False),
    (4, 4, 1, False), (4, 4, 1, True),
]  # fmt: skip
CONTEXT_LAYOUTS = [  # with the number of context-parallel ranks
    (2, 1, 1, False, 2), (4, 1, 1, False, 2), (4, 2, 1, False, 2), (4, 2, 1, True, 2), (4, 1, 2, False, 2), (4, 1, 1, False, 4),
]  # fmt: skip
RECOMPUTE: dict[str, dict[str, Any]] = {  # keys of actor.model
    "": {},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
}
ADAPTED = {  # by the target_modules of `lora`: the Hugging Face matrices that then have adapters
    ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"): (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ),
    ("linear_qkv", "linear_fc2"): ("q_proj", "k_proj", "v_proj", "down_proj"),
    (): (),
}  # fmt: skip
SPLITS = [(budget, prefix, order) for budget, order in zip((512, 40, 70, 12), (0, 1, 2, 3)) for prefix in (True, False)]


@dataclass(frozen=True)
class Case:
    """One way to compute the step.

    budget: tokens of a micro-batch at most; order: seed of the sample order, 0 = as made; recompute: of RECOMPUTE; adapters: of ADAPTED.
    """

    ranks: int
    tp: int
    pp: int
    sequence_parallel: bool
    family: str
    budget: int
    share_prefix: bool
    order: int
    head: str = "lm"
    recompute: str = ""
    cp: int = 1
    adapters: tuple[str, ...] = ()

    @property
    def weights(self) -> str:
        return self.family if self.head == "lm" else f"{self.family}-critic"

    @property
    def model(self) -> str:
        return f"{self.weights} LoRA({len(self.adapters)})" if self.adapters else self.weights

    @property
    def dp(self) -> int:
        return self.ranks // (self.tp * self.cp * self.pp)

    def label(self) -> str:
        words = (("SP", self.sequence_parallel), ("shared prefix", self.share_prefix), (f"recompute {self.recompute}", self.recompute))
        switches = [word for word, on in words if on]
        context = f" CP{self.cp}" if self.cp > 1 else ""
        return ", ".join(
            [f"{self.model} TP{self.tp}{context} PP{self.pp} DP{self.dp}", *switches, f"budget {self.budget}", f"order {self.order}"]
        )


@dataclass(frozen=True)
class Measured:
    """What a rank saw. steps[i].grads and .weights hold the rank's stage if it is the stage's first rank, else nothing.

    replicas: checksum of every parameter shard under a name that is the same wherever the shard is the same. outputs: log-probabilities
    or values of the initial model by sample, of the samples that the rank's last stage saw.
    """

    steps: list[Step]
    outputs: dict[str, np.ndarray]
    replicas: dict[str, str]
    micro_batches: int


@dataclass(frozen=True)
class Finding:
    """Deviations from the reference in units of their scale (see the tolerances), the tensor or metric with the largest one."""

    case: Case
    micro_batches: int
    loss: float
    gradient: float
    gradient_of: str
    norm: float
    metric: float
    metric_of: str
    weight: float
    weight_of: str
    replicas_equal: bool
    seconds: float

    @property
    def holds(self) -> bool:
        return self.within(1.0)

    def within(self, slack: float) -> bool:
        """Whether every deviation is at most `slack` times its tolerance."""
        pairs = [(self.loss, LOSS_TOLERANCE), (self.gradient, GRADIENT_TOLERANCE), (self.norm, NORM_TOLERANCE),
                 (self.metric, METRIC_TOLERANCE), (self.weight, WEIGHT_TOLERANCE)]  # fmt: skip
        return self.replicas_equal and all(value <= slack * bound for value, bound in pairs)


def make_cases(quick: bool = False) -> list[Case]:
    """Every layout with every family that has enough key/value heads (with context parallelism half of them in turn), with a critic and
    with adapters, the splits and recomputations taken in turn; quick: every layout once of each kind."""
    cases, recompute = [], list(RECOMPUTE)
    for i, (layout, cp) in enumerate([(at, 1) for at in LAYOUTS] + [(at[:4], at[4]) for at in CONTEXT_LAYOUTS]):
        families = [f for f, config in FAMILIES.items() if layout[1] <= config.get("num_key_value_heads", 2)]
        families = families[i % 2 :: 2] if cp > 1 else families
        for j, family in enumerate(families):
            if not quick or j == i % len(families):
                split = SPLITS[(5 * i + 3 * j) % len(SPLITS)]  # every family meets every split
                cases.append(Case(*layout, family, *split, recompute=recompute[(i + j + i // 4) % 4], cp=cp))
        critic, adapted = (families[(i + turn) % len(families)] for turn in (1, 2))
        cases.append(Case(*layout, critic, *SPLITS[(5 * i + 7) % len(SPLITS)], head="scalar", recompute=recompute[(i + 1) % 4], cp=cp))
        how = {"head": "scalar" if i % 5 == 4 else "lm", "adapters": list(ADAPTED)[i % 3 == 2], "recompute": recompute[(i + 2) % 4]}
        cases.append(Case(*layout, adapted, *SPLITS[(5 * i + 4) % len(SPLITS)], cp=cp, **how))  # type: ignore[arg-type]
    return cases


def measure(at: Coordinates, case: Case, folder: str, batch: Batch, device: str = "cpu") -> Measured:
    """Runs in every rank: both optimizer steps, the way a train worker makes them."""
    arch = open_architecture(folder)
    model = ActorModelConfig(case.tp, case.pp, case.sequence_parallel, precision="fp32", **RECOMPUTE[case.recompute])
    lora = replace(LORA, target_modules=list(case.adapters)) if case.adapters else LoraConfig()
    engine = MegatronEngine(arch, model, OPTIM, at, torch.device(device), case.head, lora)
    adapters = {name: first_adapter(name, shape) for name, shape in engine.adapters.shapes.items()}
    engine.load_hf(ChainMap(adapters, open_hf_folder(folder)))  # type: ignore[arg-type]  # it is only read
    batch = batch.shuffled(case.order)
    headers = [g.header() for g in batch.groups]
    plan = build_rank_batches(headers, batch.advantages, dp=at.dp, n_minibatches=2, max_tokens=case.budget, share_prefix=case.share_prefix)[
        at.dp_rank
    ]
    groups = [next(g for g in batch.groups if g.group_id == group_id) for group_id in plan.group_ids]
    packs = [
        [
            pack(groups, refs, share_prefix=case.share_prefix, temperature=TEMPERATURE, pad_to=engine.pad_to, device=engine.device)
            for refs in mini.micro_batches
        ]
        for mini in plan.mini_batches
    ]
    before = [[logprobs for logprobs, _ in engine.logprobs(p)] if case.head == "lm" else engine.scores(p) for p in packs]
    steps = []
    for i, mini in enumerate(plan.mini_batches):
        denominators = Denominators(mini.global_tokens, mini.global_samples)
        if case.head == "lm":  # the first mini-batch's own forward pass is the old policy
            update = engine.update(packs[i], None if i == 0 else before[i] or None, before[i] or None, denominators, SETTINGS, None)
            metrics = finalize_metrics(update.metrics.sums, update.metrics.maxima)
            metrics |= {} if update.expert_load is None else load_metrics(update.expert_load)
        else:  # the target of a sample's values is its advantage
            update = engine.update_values(packs[i], before[i], [b.advantages_N for b in packs[i]], denominators, VALUE_SETTINGS)
            metrics = finalize_value_metrics(update.metrics)
        grads = to_numpy(engine.export("exp_avg"))  # beta1 is 0: the first moment is the gradient
        weights = to_numpy(engine.export("param")) | to_numpy(engine.export())
        if not at.leads or at.dp_rank:
            grads, weights = {}, {}
        steps.append(Step(metrics, update.grad_norm, grads, weights))
    replicas = checksums(engine)
    computed = [pair for batches, values in zip(packs, before) for pair in zip(batches, values)]
    outputs = {sample: values for b, values_T in computed for sample, values in by_sample(b, values_T).items()}
    return Measured(steps, outputs, replicas, sum(len(mini.micro_batches) for mini in plan.mini_batches))


def to_numpy(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy().copy() for name, tensor in tensors}


def checksums(engine: MegatronEngine) -> dict[str, str]:
    """A checksum of each parameter of this rank, named by its HF tensors and, when it is sharded, the shard."""
    found = {}
    for rule, param in engine.state.params + engine.adapters.params:
        shard = f"#{engine.at.tp_rank}" if rule.sharded else ""
        found["+".join(rule.hf) + shard] = hashlib.sha256(param.detach().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def judge(case: Case, ranks: Sequence[Measured], expected: Expected, advantage: float, seconds: float) -> Finding:
    """Compare what the ranks saw with what must be. advantage: mean |advantage|."""
    losses, norms, gradients, weights = [], [], [], []
    metrics = compare_outputs({k: v for rank in ranks for k, v in rank.outputs.items()}, expected.outputs)
    loss = "train/loss" if case.head == "lm" else "critic/loss"
    for i, want in enumerate(expected.steps):
        for rank in ranks:
            got = rank.steps[i]
            losses.append(abs(got.metrics[loss] - want.metrics[loss]) / (advantage if case.head == "lm" else want.metrics[loss]))
            norms.append(abs(got.grad_norm - want.grad_norm) / want.grad_norm)
            metrics += [(abs(got.metrics[k] - v) / max(1.0, abs(v)), k) for k, v in want.metrics.items()]
        grads = {k: v for rank in ranks for k, v in rank.steps[i].grads.items()}
        gradients += deviations(grads, want.grads, want.grads)
        after = {k: v for rank in ranks for k, v in rank.steps[i].weights.items()}
        moved = {k: v - expected.start[k] for k, v in want.weights.items()}
        weights += deviations(after, want.weights, moved, {k: ROUNDING * norm(v) for k, v in want.weights.items()})
    (gradient, gradient_of), (weight, weight_of), (metric, metric_of) = worst(gradients), worst(weights), worst(metrics)
    return Finding(
        case, ranks[0].micro_batches, worst((x, "") for x in losses)[0], gradient, gradient_of, worst((x, "") for x in norms)[0],
        metric, metric_of, weight, weight_of, replicas_agree(ranks), seconds,
    )  # fmt: skip


def compare_outputs(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> list[tuple[float, str]]:
    """The largest difference of a token's log-probability or value, relative to max(1, |it|), of each sample;
    infinite where one is missing."""
    found = [(math.inf, name) for name in got.keys() ^ want.keys()]
    return found + [(float(np.max(np.abs(got[k] - want[k]) / np.maximum(1.0, np.abs(want[k])))), k) for k in got.keys() & want.keys()]


def deviations(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], scale: dict[str, np.ndarray], allowed: dict[str, float] | None = None
) -> list[tuple[float, str]]:
    """||got - want|| / max(||scale||, 1e-3 ||scale of all tensors||) of each tensor; infinite where a tensor is missing or too many."""
    floor = 1e-3 * math.sqrt(sum(norm(s) ** 2 for s in scale.values()))
    found = [(math.inf, name) for name in got.keys() ^ want.keys()]
    for name in got.keys() & want.keys():
        distance = norm(got[name].astype(np.float64) - want[name])
        if allowed is not None and distance <= allowed[name]:
            distance = 0.0
        found.append((distance / max(norm(scale[name]), floor), name))
    return found


def norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))


def worst(found: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """The largest deviation; NaN is larger than anything."""
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])


def replicas_agree(ranks: Sequence[Measured]) -> bool:
    """Whether every copy of a parameter shard is the same bit for bit:
    over DP and CP ranks, TP ranks (norms) and stages (tied embeddings)."""
    seen: dict[str, str] = {}
    return all(seen.setdefault(name, value) == value for rank in ranks for name, value in rank.replicas.items())


def check_cases(pool: RankPool, cases: Sequence[Case], folder: Path) -> Iterable[Finding]:
    """Run the cases one by one, models written to `folder`."""
    batch = make_batch(VOCAB)
    advantage = float(np.mean([abs(a) for group in batch.advantages for a in group]))
    models = {c.weights: write_tiny_model(folder / c.weights, c.family, head=c.head) for c in cases}
    kinds = {c.model: c for c in cases}.values()
    expected = {c.model: plain_steps(models[c.weights], batch, c.head, ADAPTED[c.adapters]) for c in kinds}
    for case in cases:
        started = time.perf_counter()
        ranks = pool.run(measure, case, str(models[case.weights]), batch, ranks=case.ranks, tp=case.tp, pp=case.pp, cp=case.cp)
        yield judge(case, ranks, expected[case.model], advantage, time.perf_counter() - started)


def table(findings: Sequence[Finding]) -> Table:
    """One line a layout; the figures are the largest deviations in units of their scale."""
    out = Table(title="The same two optimizer steps in every layout, against plain transformers (fp32)", title_justify="left")
    for name in (
        "family",
        "ranks",
        "TP",
        "CP",
        "PP",
        "DP",
        "SP",
        "micro-batches",
        "prefix",
        "order",
        "recompute",
        "loss",
        "gradient",
        "norm",
        "weights",
        "metrics",
        "s",
        "",
    ):
        out.add_column(name, justify="left" if name in ("family", "recompute") else "right", no_wrap=True)
    for v in findings:
        c = v.case
        where = [
            c.model,
            c.ranks,
            c.tp,
            c.cp,
            c.pp,
            c.dp,
            "on" if c.sequence_parallel else "",
            v.micro_batches,
            "shared" if c.share_prefix else "own",
            c.order,
            c.recompute,
        ]
        figures = [f"{x:.0e}" for x in (v.loss, v.gradient, v.norm, v.weight, v.metric)]
        out.add_row(*map(str, where), *figures, f"{v.seconds:.1f}", "ok" if v.holds else "[red]FAILS[/]")
    bounds = [f"{x:.0e}" for x in (LOSS_TOLERANCE, GRADIENT_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE, METRIC_TOLERANCE)]
    out.add_section()
    out.add_row("at most", *[""] * 10, *bounds, "", "")
    return out


def complaint(v: Finding) -> str:
    """What is wrong with a layout that fails, in one line."""
    return (
        f"{v.case.label()}: loss {v.loss:.1e}, gradient {v.gradient:.1e} ({v.gradient_of}), norm {v.norm:.1e}, "
        f"weights {v.weight:.1e} ({v.weight_of}), metrics {v.metric:.1e} ({v.metric_of}), "
        f"replicas {'equal' if v.replicas_equal else 'DIFFER'}"
    )


def main(quick: bool, json_file: Path | None) -> int:
    """The command. Exit code 0 when every layout holds, else 1."""
    started = time.perf_counter()
    console = Console(width=None if Console().is_terminal else 160)
    cases = make_cases(quick)
    with RankPool(RANKS) as pool, tempfile.TemporaryDirectory(prefix="rlinf-layout-") as folder:
        pool.start()  # its imports go on beside the reference computation
        findings = list(track(check_cases(pool, cases, Path(folder)), "layouts", len(cases), console=Console(stderr=True), transient=True))
    seconds = time.perf_counter() - started
    failing = [v for v in findings if not v.holds]
    console.print(table(findings))
    for v in failing[:COMPLAINTS]:
        console.print(complaint(v), style="red", highlight=False)
    console.print(f"{len(findings) - len(failing)} of {len(findings)} layouts hold; {seconds:.0f} s", highlight=False)
    if json_file:
        json_file.write_text(json.dumps(report(findings, seconds), indent=1) + "\n")
    return 1 if failing else 0


def report(findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    return {
        "tolerances": {
            "loss": LOSS_TOLERANCE,
            "gradient": GRADIENT_TOLERANCE,
            "norm": NORM_TOLERANCE,
            "weight": WEIGHT_TOLERANCE,
            "metric": METRIC_TOLERANCE,
        },
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "torch": torch.__version__},
        "seconds": seconds,
        "holds": all(v.holds for v in findings),
        "layouts": [asdict(v) | {"holds": v.holds, "dp": v.case.dp} for v in findings],
    }
