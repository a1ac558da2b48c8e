"""The order of the training data: a seeded stream of prompt indices that can be stopped and continued anywhere.

The stream is the epochs' orders one after the other, cut into batches. A batch at the end of an epoch is filled from the start of the next
one, so every prompt is seen once in each epoch and none is skipped; such a batch may hold a prompt twice, once from each epoch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlinf.errors import UserError

_MEANING = {"n": "a number of training prompts of", "seed": "data.seed", "shuffle": "data.shuffle", "fingerprint": "training data"}


def epoch_order(n: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch [n]. It depends on the arguments only, and is the same on every machine and with every numpy version.

    It sorts raw Philox words, because numpy keeps the stream of a bit generator stable, but not the algorithm of `permutation`.
    """
    if not shuffle:
        return np.arange(n)
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind="stable")


class PromptSampler:
    """Batches of prompt indices. `epoch` counts from 0; `cursor` is the number of prompts of that epoch already handed out.

    fingerprint: identifies the prompts (DataReport.fingerprint); a state that was saved with other prompts is refused.
    Raises UserError when there are fewer prompts than one batch needs.
    """

    def __init__(
        self, n: int, batch_size: int, shuffle: bool, seed: int, fingerprint: str = "", batch_key: str = "data.rollout_batch_size"
    ) -> None:
        if batch_size < 1:
            raise UserError(f"{batch_key}: {batch_size} is not a number of prompts; it must be at least 1")
        if n < batch_size:
            raise UserError(
                f"{batch_key} is {batch_size}, but data.train_data_paths hold only {n} prompts after filtering: "
                "add data, or make the batch smaller"
            )
        if not 0 <= seed < 2**63:
            raise UserError(f"data.seed: {seed} is {'negative' if seed < 0 else 'too large'}; use 0 or more, and less than {2**63}")
        self.n, self.batch_size, self.shuffle, self.seed, self.fingerprint = n, batch_size, shuffle, seed, fingerprint
        self.epoch, self.cursor = 0, 0
        self._order = epoch_order(n, shuffle, seed, 0)

    def next_batch(self, size: int | None = None) -> list[int]:
        """The next `size` prompts of the stream; None = a batch."""
        wanted = self.batch_size if size is None else size
        batch: list[int] = []
        while len(batch) < wanted:
            if self.cursor == self.n:
                self._go_to(self.epoch + 1, 0)
            taken = self._order[self.cursor : self.cursor + wanted - len(batch)]
            batch += taken.tolist()
            self.cursor += len(taken)
        return batch

    def give_back(self, count: int) -> None:
        """Return the last `count` prompts to the stream: they come next."""
        self._go_to(*divmod(self.handed_out - count, self.n))

    @property
    def handed_out(self) -> int:
        """How many prompts were handed out since the start of the run."""
        return self.epoch * self.n + self.cursor

    def exhausted(self, max_epochs: int) -> bool:
        """Whether less than a batch is left of max_epochs epochs."""
        return self.n * max_epochs - self.handed_out < self.batch_size

    def total_steps(self, max_epochs: int, max_steps: int, done: int = 0, waiting: int = 0) -> int:
        """The number of steps of a run: as many as there are whole batches in max_epochs epochs, at most max_steps unless that is -1.

        done: steps that were made so far, with batches of any size. waiting: prompts that were handed out for steps not yet made.
        """
        left = self.n * max_epochs - self.handed_out + waiting
        by_epochs = done + max(0, left // self.batch_size)
        return by_epochs if max_steps == -1 else min(by_epochs, max_steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values. The batch size is not part of it: the stream goes on in batches of any size."""
        return {"epoch": self.epoch, "cursor": self.cursor} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises UserError when it was saved with other data, data.seed or data.shuffle."""
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise UserError(
                    f"cannot resume: the checkpoint was made with {_MEANING[name]} {state[name]!r}, this run has {mine!r}; "
                    "resuming would repeat some prompts and skip others. Restore it, or start a new run"
                )
        self._go_to(state["epoch"], state["cursor"])

    def _identity(self) -> dict[str, Any]:
        return {"n": self.n, "seed": self.seed, "shuffle": self.shuffle, "fingerprint": self.fingerprint}

    def _go_to(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        self._order = epoch_order(self.n, self.shuffle, self.seed, epoch)
