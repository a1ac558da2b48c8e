"""What the fork server of checks/rank_pool.py imports for all ranks."""

import os

from rlinf.hardware import VISIBLE_GPUS

# Whatever looks for a GPU while it is imported must find none, or the ranks could not be forked; and a fork loses all threads but one.
os.environ |= {VISIBLE_GPUS: "", "OPENBLAS_NUM_THREADS": "1"}

import rlinf.training.engine  # noqa: E402, F401
import rlinf.workers.actor  # noqa: E402, F401
