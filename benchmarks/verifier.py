"""The verifier against math-verify alone: 2,000 distinct labelled pairs in one run; and the cheap routes by themselves.

    python benchmarks/verifier.py [--processes 2] [--out benchmarks/results/verifier.json]
    python benchmarks/verifier.py --write-pairs        (writes benchmarks/verifier_pairs.jsonl again, from its seed)

Kinds: 45 % integers, 15 % fractions and decimals, 20 % symbolic, 10 % sets, tuples and intervals, 10 % malformed. Half of the readable
ones are right. Both sides get the same 400-character responses; math-verify runs with its defaults in one process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from rlinf.rewards.verifier import Item, Verifier

HERE = Path(__file__).parent
PAIRS = HERE / "verifier_pairs.jsonl"
COUNTS = {"integer": 900, "rational": 300, "symbolic": 400, "collection": 200, "malformed": 200}
FILLER = "We first note that $a = 3$ and $b = \\frac{1}{2}$, so that the sum is $a + b = \\frac{7}{2}$ as claimed above. "
LENGTH = 400


def integer(rng: random.Random) -> tuple[str, str, bool]:
    n, right = rng.randint(-(10**6), 10**6), rng.random() < 0.5
    m = n if right else rng.choice([n + 1, -n - 1, n * 10 + 1, n + 100])
    return str(n), rng.choice([str(m), f"{m:,}", f"{m}.0", f"x = {m}", f"{m} \\text{{ cm}}", f"\\text{{{m}}}", f"{m}."]), right


def rational(rng: random.Random) -> tuple[str, str, bool]:
    x, right = Fraction(rng.randint(-500, 500), rng.choice([2, 3, 4, 5, 7, 8, 12, 20, 25])), rng.random() < 0.5
    y = x if right else x + rng.choice([1, Fraction(1, 2), Fraction(1, 7), -1])
    k = rng.randint(2, 9)
    forms = [f"{y.numerator}/{y.denominator}", frac(y), f"\\dfrac{{{y.numerator * k}}}{{{y.denominator * k}}}", f"\\left({frac(y)}\\right)"]
    if (y * 1000).denominator == 1:
        forms += [f"{float(y):.3f}"] * 3
    return frac(x), rng.choice(forms), right


def symbolic(rng: random.Random) -> tuple[str, str, bool]:
    right, a, b, c = rng.random() < 0.5, rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 9)
    d = a if right else a + 1
    return rng.choice(
        [
            (f"{c * a}\\sqrt{{{b}}}", f"\\sqrt{{{c * c * d * d * b}}}", right),
            (f"\\frac{{{a}}}{{\\sqrt{{{b}}}}}", f"\\frac{{{d}\\sqrt{{{b}}}}}{{{b}}}", right),
            (f"x^2+{a + b}x+{a * b}", f"(x+{d})(x+{b})", right),
            (f"{a}\\pi+{b}", f"{b}+\\pi \\cdot {d}", right),
            (f"{a}x+{b}y", f"{b}y+{d}x", right),
            (f"\\frac{{{a}x+{b}}}{{{c}}}", f"\\frac{{{d}}}{{{c}}}x+\\frac{{{b}}}{{{c}}}", right),
            (f"y={a}x+{b}", f"y-{d}x={b}", right),
            (f"{a}e^{{{b}x}}", f"e^{{{b}x}} \\cdot {d}", right),
            (f"{c}\\ln {a * b}", f"{c}\\ln {d}+{c}\\ln {b}", right),
            (f"{a}+{b}i", f"{b}i+{d}", right),
        ]
    )


def collection(rng: random.Random) -> tuple[str, str, bool]:
    right, a, b, c = rng.random() < 0.5, rng.randint(-40, 0), rng.randint(1, 40), rng.randint(41, 90)
    d = c if right else c + 1
    return rng.choice(
        [
            (f"\\{{{a},{b},{c}\\}}", f"\\{{{d}, {a}, {b}\\}}", right),
            (f"({a},{c})", f"({a}, {d})", right),
            (f"({a},{b},{c})", f"\\left({a}, {b}, {d}\\right)", right),
            (f"[{a},{c})", f"\\left[{a}, {d}\\right)", right),
            (f"(-\\infty,{b})\\cup({c},\\infty)", f"({d},\\infty)\\cup(-\\infty,{b})", right),
            (f"{a},{c}", f"{d}, {a}", right),
            (f"x>{c}", f"({d},\\infty)", right),
            (f"\\frac{{{b}}}{{2}},{c}", f"{d}, {b / 2}", right),
        ]
    )


def malformed(rng: random.Random) -> tuple[str, str, bool]:
    """The answer is what stands in the place of the box: nothing of it is right."""
    n = rng.randint(1, 10**6)
    return (
        str(n),
        rng.choice(
            [
                f"NOBOX {n}",
                f"OPEN {n}",
                "EMPTY",
                f"\\frac{{{n}}}",
                f"{n} or {n + 1}",
                f"{n}?",
                f"\\sqrt{{{n}",
                f"not {n}",
                f"({n},",
                f"{n} {n}",
            ]
        ),
        False,
    )


KINDS = {"integer": integer, "rational": rational, "symbolic": symbolic, "collection": collection, "malformed": malformed}


def frac(x: Fraction) -> str:
    return f"{'-' if x < 0 else ''}\\frac{{{abs(x.numerator)}}}{{{x.denominator}}}"


def write_pairs(seed: int = 5) -> None:
    rng, seen = random.Random(seed), set()
    with open(PAIRS, "w", encoding="utf-8") as out:
        for kind, count in COUNTS.items():
            made = 0
            while made < count:
                gold, answer, right = KINDS[kind](rng)
                if (gold, answer) not in seen and (right or answer != gold):
                    seen.add((gold, answer))
                    out.write(json.dumps({"kind": kind, "gold": gold, "answer": answer, "right": right}) + "\n")
                    made += 1


def response(answer: str, serial: int) -> str:
    word, _, rest = answer.partition(" ")
    end = {"NOBOX": f"The answer is {rest}.", "OPEN": f"The answer is $\\boxed{{{rest}", "EMPTY": "The answer is $\\boxed{}$."}.get(
        word, f"The answer is $\\boxed{{{answer}}}$."
    )
    return (f"({serial}) " + FILLER * 5)[: LENGTH - len(end) - 1] + " " + end


def load() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def ours(pairs: list[dict[str, Any]], processes: int) -> tuple[list[str], float]:
    items = [Item(response(p["answer"], i), (f"\\boxed{{{p['gold']}}}",)) for i, p in enumerate(pairs)]
    with Verifier(num_processes=processes) as verifier:
        verifier.verify_many([Item(f"\\boxed{{\\sqrt{{{k}}}}}", ("0",)) for k in range(2, 2 + 4 * processes)])  # processes are up
        started = time.perf_counter()
        verdicts = verifier.verify_many(items)
        return [v.status.value for v in verdicts], time.perf_counter() - started


def math_verify(pairs: list[dict[str, Any]]) -> tuple[list[str], float]:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    verify(parse("\\boxed{1}"), parse("\\boxed{\\sqrt{4}}"))
    statuses = []
    started = time.perf_counter()
    for i, p in enumerate(pairs):
        right = verify(parse(f"\\boxed{{{p['gold']}}}"), parse(response(p["answer"], i)))
        statuses.append("right" if right else "wrong")
    return statuses, time.perf_counter() - started


def cheap_rate(count: int = 40_000) -> dict[str, float]:
    """Distinct verdicts of integer and decimal golds in one process: a second, and a second of CPU time (the machine may be shared)."""
    rng = random.Random(7)
    items = []
    for i in range(count):
        n = rng.randint(-(10**7), 10**7)
        gold, answer = rng.choice(
            [
                (str(n), str(n)),
                (str(n), str(n + 1)),
                (f"{n / 100:.2f}", f"{n / 100:.2f}0"),
                (f"{n / 100:.2f}", f"{n / 100 + 1:.2f}"),
                (str(abs(n)), f"{abs(n):,}"),
            ]
        )
        items.append(Item(response(answer, i), (f"\\boxed{{{gold}}}",)))
    started, cpu_started = time.perf_counter(), time.process_time()
    Verifier().verify_many(items)
    return {"per_second": count / (time.perf_counter() - started), "per_cpu_second": count / (time.process_time() - cpu_started)}


def scores(pairs: list[dict[str, Any]], statuses: list[str]) -> dict[str, Any]:
    right = [p["right"] for p in pairs]
    accepted = [s == "right" for s in statuses]
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for p, a in zip(pairs, accepted):
        by_kind[p["kind"]].append(a == p["right"])
    return {
        "agreement": sum(a == r for a, r in zip(accepted, right)) / len(pairs),
        "true_accepted": sum(a for a, r in zip(accepted, right) if r) / sum(right),
        "specificity": sum(not a for a, r in zip(accepted, right) if not r) / (len(right) - sum(right)),
        "undecided": statuses.count("undecided") / len(pairs),
        "agreement_by_kind": {k: round(sum(v) / len(v), 4) for k, v in by_kind.items()},
    }


def disagreements(pairs: list[dict[str, Any]], statuses: list[str]) -> Iterator[str]:
    for p, s in zip(pairs, statuses):
        if (s == "right") != p["right"]:
            yield f"{p['kind']}: {p['gold']} {'==' if p['right'] else '!='} {p['answer']}: {s}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "verifier.json")
    parser.add_argument("--write-pairs", action="store_true")
    args = parser.parse_args()
    if args.write_pairs:
        write_pairs()
        return
    pairs = load()
    single, _ = ours(pairs, 1)
    statuses, seconds = ours(pairs, args.processes)
    peer, peer_seconds = math_verify(pairs)
    result = {
        "pairs": len(pairs), "distinct": len({(p["gold"], p["answer"]) for p in pairs}), "kinds": dict(Counter(p["kind"] for p in pairs)),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version(), "load_average": os.getloadavg()},
        "processes": args.processes, "seconds": seconds, "pairs_per_second": len(pairs) / seconds, **scores(pairs, statuses),
        "math_verify": {"seconds": peer_seconds, "pairs_per_second": len(pairs) / peer_seconds, **scores(pairs, peer)},
        "speed_ratio": peer_seconds / seconds,
        "disagreement_between_1_and_n_processes": sum(a != b for a, b in zip(single, statuses)),
        "cheap_verdicts_of_one_process": cheap_rate(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    for line in disagreements(pairs, statuses):
        print(line)


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
