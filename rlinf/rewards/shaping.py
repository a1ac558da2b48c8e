"""Parts of a reward besides correctness, as pure functions. A part that is switched off does not appear in verdicts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rlinf.data.records import Status, Verdict
from rlinf.rewards.math.extract import counted_text, ends_inside_thinking, last_box

FOUR_LEVELS = {(True, True): 1.0, (False, True): 0.0, (True, False): -0.5, (False, False): -1.0}  # (right, concluded): share of the scale
CONCLUSION = re.compile(r"\s*<think>(.*)</think>\s*<conclusion>(.*)</conclusion>\s*", re.DOTALL)


@dataclass(frozen=True)
class Shaping:
    """The parts that are switched on, and their sizes.

    format_reward: added for a well-formed response. overlong_buffer (tokens), overlong_penalty: see soft_overlong. exploration_penalty: see
    exploration.
    four_levels: a reward scale; FOUR_LEVELS then replace the reward for correctness; None = off.
    max_new_tokens: the hard limit of a response, from which overlong_buffer counts back.
    """

    max_new_tokens: int
    format_reward: float = 0.0
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    exploration_penalty: float = 0.0
    four_levels: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise ValueError(f"overlong_buffer must be between 0 and max_new_tokens ({self.max_new_tokens}), got {self.overlong_buffer}")
        if self.overlong_penalty < 0 or self.exploration_penalty < 0:
            raise ValueError("overlong_penalty and exploration_penalty must not be negative")

    def apply(self, verdict: Verdict, prompt: str, response: str, length: int) -> Verdict:
        """The verdict with the parts added to its reward; status and correctness do not change."""
        parts: list[tuple[str, float]] = []
        if self.four_levels is not None:
            level = FOUR_LEVELS[verdict.status is Status.RIGHT, concluded(prompt, response)]
            parts.append(("four_levels", self.four_levels * level - verdict.reward))
        if self.format_reward:
            parts.append(("format", self.format_reward * well_formed(prompt, response)))
        if self.overlong_buffer:
            parts.append(("overlong", self.overlong_penalty * soft_overlong(length, self.max_new_tokens, self.overlong_buffer)))
        if self.exploration_penalty:
            parts.append(("exploration", exploration(length, self.exploration_penalty)))
        return replace(verdict, reward=verdict.reward + sum(v for _, v in parts), parts=tuple(parts)) if parts else verdict


def soft_overlong(length: int, limit: int, buffer: int) -> float:
    """0 up to limit - buffer tokens, then linear down to -1 at the limit (DAPO, arXiv 2503.14476, section 3.4)."""
    return min(0.0, max(-1.0, (limit - buffer - length) / buffer))


def exploration(length: int, penalty: float) -> float:
    """-penalty / length, at least -1: a short response costs much, a long one little (RLSP, arXiv 2502.06773). An empty response costs
    1."""
    return -min(1.0, penalty / length) if length else -1.0


def well_formed(prompt: str, response: str) -> bool:
    """Whether there is one closed thinking section, if the prompt or the response opens one, and then an answer in a box, and only one
    box."""
    opened = int(ends_inside_thinking(prompt)) + response.count("<think>")
    if opened > 1 or response.count("</think>") != opened:
        return False
    text = counted_text(response, prompt)
    return text is not None and text.count("\\boxed") == 1 and bool((last_box(text) or "").strip())


def concluded(prompt: str, response: str) -> bool:
    r"""`<think>…</think><conclusion>…\boxed{}…</conclusion>`, each mark once, something in the box (RaML, arXiv 2505.19815);
    the prompt may open the thinking."""
    match = CONCLUSION.fullmatch(("<think>" if ends_inside_thinking(prompt) else "") + response)
    if match is None or any(mark in part for part in match.groups() for mark in ("<think>", "</think>", "<conclusion>", "</conclusion>")):
        return False
    return bool((last_box(match[2]) or "").strip())
