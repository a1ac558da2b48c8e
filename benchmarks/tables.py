"""The tables of docs/results.md, made from benchmarks/results/*.json: `python benchmarks/tables.py` writes them anew into the page.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a test compares the page with the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quickstart(result: dict[str, Any]) -> list[str]:
    lines = [
        "| run | steps | reward, first 3 → last 5 steps | greedy right before → after | gain, points | boxed before, after | CPU seconds | "
        "peak memory (PSS) | wall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in result["runs"].items():
        gain = interval(r["greedy_gain"], r["greedy_gain_low"], r["greedy_gain_high"], "+.1f")
        lines.append(
            f"| {title(name)} | {r['steps']} | {r['reward_first_3']:+.1f} → {r['reward_last_5']:+.1f} | "
            f"{percent(r['greedy_before'])} → {percent(r['greedy_after'])} | {gain} | "
            f"{percent(r['boxed_before'])}, {percent(r['boxed_after'])} | "
            f"{r['cpu_seconds']:.0f} | {r['peak_pss_gib']:.2f} GiB | {r['wall_seconds']:.0f} s |"
        )
    return lines


def sampling(result: dict[str, Any]) -> list[str]:
    lines = ["| seed | avg@4, % | pass@4, % | maj@4, % | mg-pass@2, % | tokens | truncated | no box |", "|---|---|---|---|---|---|---|---|"]
    for name, scores in result["runs"].items():
        shares = [interval(*(scores[s][k] for k in ("value", "low", "high")), ".1f") for s in ("avg@4", "pass@4", "maj@4", "mg-pass@2")]
        rest = [f"{scores['response_length']['value']:.1f}", *(percent(scores[s]["value"]) for s in ("truncated", "no_box"))]
        lines.append(f"| {name.removeprefix('seed-')} | {' | '.join([*shares, *rest])} |")
    return lines


def verifier(result: dict[str, Any]) -> list[str]:
    lines = [
        "| judge | agrees with the label | right ones accepted | wrong ones refused | undecided | pairs a second |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in ((f"ours, {result['processes']} processes", result), ("math-verify 0.9.0, 1 process", result["math_verify"])):
        shares = [percent(r[s]) for s in ("agreement", "true_accepted", "specificity", "undecided")]
        lines.append(f"| {name} | {' | '.join(shares)} | {r['pairs_per_second']:,.0f} |")
    return lines


TRAINER_CASES = {
    "plain": "engine / transformers + torch",
    "equal": "four groups, two of them with equal rewards: a backward pass for all / for those with a gradient",
}


def trainer(result: dict[str, Any]) -> list[str]:
    lines = ["| case | ratio of CPU seconds | 5 %, 95 % | aim | ratio of the tokens | a step, CPU seconds |", "|---|---|---|---|---|---|"]
    for name, c in result["cases"].items():
        what = TRAINER_CASES.get(name, "a copy for each sample / shared, prompt-response-samples " + name) + f", {c['precision']}"
        aim = "95 % at most 1.20" if name == "plain" else f"at least {c['aim']:.2f}"
        tokens = f"{c['token_ratio']:.2f}" if "token_ratio" in c else "—"
        seconds = " / ".join(f"{sum(s) / len(s):.2f}" for s in c["cpu_seconds"].values())
        lines.append(f"| {what} | {c['ratio']:.2f} | {c['p5']:.2f}, {c['p95']:.2f} | {aim} | {tokens} | {seconds} |")
    return lines


def distill(result: dict[str, Any]) -> list[str]:
    return by_step(result, "eval/accuracy", "rollout/accuracy", "rollout/token_reward_mean", "train/entropy_loss")


def ppo(result: dict[str, Any]) -> list[str]:
    return by_step(
        result,
        "rollout/rewards",
        "critic/return_mean",
        "critic/value_mean",
        "critic/value_error",
        "critic/explained_variance",
        "train/entropy_loss",
        "train/clip_fraction",
    )


def by_step(result: dict[str, Any], *names: str) -> list[str]:
    """Metrics of a run, a row for each of its steps."""
    lines = [f"| step | {' | '.join(f'`{name}`' for name in names)} |", "|---|" + "---|" * len(names)]
    return lines + [f"| {s['step']:.0f} | " + " | ".join(f"{s[n]:.2f}" if n in s else "—" for n in names) + " |" for s in result["steps"]]


def asynchrony(result: dict[str, Any]) -> list[str]:
    lines = [
        "| schedule | seconds a step, simulated | faster | oldest token, versions | length bias of the first step | mean of all steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in result["medians"].items():
        bias = " | ".join(f"{round(100 * r[f'length_bias_{of}'], 1) + 0.0:+.1f} %" for of in ("of_first_step", "mean"))
        lines.append(f"| {name} | {r['seconds_per_step']:,.0f} | {r['speedup']:.2f} × | {r['staleness_max']:.0f} | {bias} |")
    return lines


def rollout_engine(result: dict[str, Any]) -> list[str]:
    lines = ["| case | engine, tokens a second | transformers | ratio | aim |", "|---|---|---|---|---|"]
    for name, c in result["cases"].items():
        ours, theirs = (median(c[f"{side}_tokens_per_second"]) for side in ("engine", "transformers"))
        lines.append(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {c['ratio']:.2f} | at least {c['aim']:.1f} |")
    return lines


def weight_sync(result: dict[str, Any]) -> list[str]:
    lines = [
        "| precision | memcpy, GB/s: one thread, all | actor to shared memory | the way, summed on both sides | to the engine | "
        "whole sync | the way, of the faster memcpy | whole sync, of the faster memcpy | aim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in result["cases"].items():
        memcpy, rates = c["memcpy_gb_per_second"], c["gb_per_second"]
        speeds = " | ".join(f"{rates[part]:.2f}" for part in ("publish", "way", "load", "sync"))
        shares = " | ".join(percent(c[share]) for share in ("way_share_of_memcpy", "share_of_memcpy", "aim"))
        lines.append(f"| {name} | {memcpy['one_thread']:.1f}, {memcpy['all_threads']:.1f} | {speeds} | {shares} |")
    return lines


def vs_trl(result: dict[str, Any]) -> list[str]:
    lines = [
        "| new tokens | a step, seconds: TRL / ours | faster | aim | peak memory, GiB: TRL / ours | new tokens a second: TRL / ours |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in result["cases"].items():
        seconds, peak, speed = ([c[key][side] for side in ("trl", "rlinf")] for key in ("seconds", "peak_gib", "new_tokens_per_second"))
        pairs = [f"{a:,.1f} / {b:,.1f}" for a, b in (seconds, peak, speed)]
        lines.append(f"| {name} | {pairs[0]} | {c['faster']:.2f} × | {c['aim']:.1f} × | {pairs[1]} | {pairs[2]} |")
    return lines


def title(run: str) -> str:
    return run.replace("seed-", "seed ").replace("control-lr-0", "control, learning rate 0")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(value: float, low: float, high: float, form: str) -> str:
    return f"{100 * value:{form}} [{100 * low:.1f}, {100 * high:.1f}]"


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "quickstart": quickstart, "ppo": ppo, "distill": distill, "sampling": sampling, "verifier": verifier, "trainer": trainer,
    "rollout_engine": rollout_engine, "weight_sync": weight_sync, "vs_trl": vs_trl, "asynchrony": asynchrony,
}  # fmt: skip


def filled(page: str) -> str:
    """The page with every table made anew."""

    def table(place: re.Match[str]) -> str:
        lines = TABLES[place[2]](json.loads((RESULTS / f"{place[2]}.json").read_text()))
        return place[1] + "\n" + "\n".join(lines) + "\n\n" + place[3]

    return PLACE.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
