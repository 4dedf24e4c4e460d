"""Model execution: one dense decoder driven by config, its sampler and its grammars.

Importing this package loads no torch; ``load_model`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caesura.runtime.model.weights import Model


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    load_format: str = "auto",
    seed: int = 0,
    revision: str | None = None,
) -> Model:
    """Load a decoder from a Hugging Face folder, or from a hub id when no such folder exists.

    ``dtype`` is float32 or bfloat16; checkpoints of other float types are converted. ``load_format="dummy"``
    draws random weights by ``seed`` from ``config.json`` alone. Raises UnsupportedModel (architecture or option),
    BrokenCheckpoint (missing, truncated, hostile, wrong shape) or NotEnoughMemory, always before weights are
    allocated.
    """
    from caesura.runtime.model import weights

    return weights.load(source, dtype=dtype, load_format=load_format, seed=seed, revision=revision)
