"""Finds the answer in a response: the text that counts, and the last balanced box in it. The time is linear in the length of the text."""

from __future__ import annotations

import re
from typing import NamedTuple

_BRACES = re.compile(
    r"(\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)\s+([^\s${}\\]+)|\\(?:boxed|fbox)(\d[\d.,/]*)|\\\\(?!boxed|fbox)|\\[{}]|([{}])"
)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")


class Extracted(NamedTuple):
    """answer: None when there is none; `route` then says why: `no_answer` (thinking never ended) or `no_box`."""

    answer: str | None
    route: str = ""


def ends_inside_thinking(prompt: str) -> bool:
    """Whether the prompt ends inside an open <think>."""
    return prompt.rfind("<think>") > prompt.rfind("</think>")


def counted_text(response: str, prompt: str = "") -> str | None:
    """The text in which the answer is looked for: what follows the last </think>; the whole response when no <think> was opened; None when
    one was opened and never closed."""
    end = response.rfind("</think>")
    if end >= 0:
        return None if response.find("<think>", end) >= 0 else response[end + len("</think>") :]
    if ends_inside_thinking(prompt) or "<think>" in response:
        return None
    return response


def last_box(text: str) -> str | None:
    r"""The content of the box (\boxed or \fbox) that closes last; an unclosed box is no box."""
    start = text.find("\\boxed{")
    if start >= 0 and text.find("\\boxed", start + 7) < 0 and "\\fbox" not in text:  # one plain box: the common case
        end = text.find("}", start)
        if end >= 0:
            inside = text[start + 7 : end]
            if "{" not in inside and "\\" not in inside:
                return inside
    found = None
    stack: list[int] = []  # for every open brace: where its box's content starts, or -1
    for match in _BRACES.finditer(text):
        box, word, digits, brace = match.groups()
        if box:
            stack.append(match.end())
        elif brace == "{":
            stack.append(-1)
        elif brace == "}":
            if stack and (begin := stack.pop()) >= 0:
                found = text[begin : match.start()]
        elif word or digits:
            found = (word or digits).rstrip(".,;")
    return found


def extract(response: str, prompt: str = "", answer_format: str = "boxed") -> Extracted:
    """The answer of a response. The method `boxed_or_final_number` falls back to the last number in the text that counts."""
    text = counted_text(response, prompt)
    if text is None:
        return Extracted(None, "no_answer")
    answer = last_box(text)
    if answer is None and answer_format == "boxed_or_final_number":
        numbers = _NUMBER.findall(text)
        answer = numbers[-1] if numbers else None
    return Extracted(answer, "") if answer is not None else Extracted(None, "no_box")
