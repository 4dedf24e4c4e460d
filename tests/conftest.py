"""One OpenMP thread per test process: idle threads of a busy machine spin and slow everything down."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
