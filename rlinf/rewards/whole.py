"""The whole reward of a response: what the verifier says, the parts that rewards/shaping.py knows, and those of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlinf.config.schema import Config
from rlinf.data.records import Status, Verdict
from rlinf.rewards.own import Response
from rlinf.rewards.own_parts import OwnParts
from rlinf.rewards.shaping import Shaping
from rlinf.rewards.verifier import Item, Verifier

VERIFIERS = {"math": Verifier}  # by reward.reward_type; rlinf.rewards.tasks says how each task is judged


class Answer(NamedTuple):
    """A response with what counts besides its text: its tokens, whether it was cut off, and the metadata of the prompt."""

    item: Item
    tokens: int = 0
    cut_off: bool = False
    metadata: Any = None


class WholeReward:
    """Rewards as the configuration says. Thread-safe; the processes end with `close`.

    Raises UserError when a function of the user's own cannot be called.
    """

    def __init__(self, config: Config, num_processes: int) -> None:
        reward = config.reward
        self.own_parts = OwnParts(reward, num_processes)
        self.verifier = VERIFIERS[reward.reward_type].of(reward, num_processes)
        self.shaping = Shaping(
            max_new_tokens=config.algorithm.sampling_params.max_new_tokens,
            format_reward=reward.format_reward,
            overlong_buffer=reward.overlong_buffer,
            overlong_penalty=reward.overlong_penalty,
            exploration_penalty=reward.exploration_penalty,
            four_levels=reward.reward_scale if reward.four_levels else None,
        )

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Verdicts with the whole reward. answers: all responses to a problem."""
        return self.pay(answers, self.verifier.verify_many([answer.item for answer in answers]))

    def pay(self, answers: Sequence[Answer], judged: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts of the verifier with all parts added to their rewards. answers: all responses to a problem."""
        pairs = list(zip(answers, judged, strict=True))
        shaped = [self.shaping.apply(verdict, a.item.prompt, a.item.text, a.tokens) for a, verdict in pairs]
        return self.own_parts.add(shaped, [response_of(answer, verdict) for answer, verdict in pairs])

    def close(self) -> None:
        self.verifier.close()
        self.own_parts.close()

    def __enter__(self) -> WholeReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def response_of(answer: Answer, verdict: Verdict) -> Response:
    """What a function of the user's own sees of an answer and its verdict."""
    item, right = answer.item, None if verdict.status is Status.UNDECIDED else verdict.status is Status.RIGHT
    about = item.solutions, item.task, verdict.extracted, right
    return Response(item.prompt, item.text, *about, answer.tokens, answer.cut_off, answer.metadata)
