"""The model that ships with the package: reads an arithmetic question, calls a calculator, answers from its result.

``tools`` are functions that models can call; ``skills`` draws tasks for them, on which ``train`` makes a larger model.
Light on purpose: importing this, ``tools``, ``skills``, ``tasks`` or ``chat`` loads no torch.
"""

from __future__ import annotations

from pathlib import Path

from caesura.runtime.errors import BrokenCheckpoint

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def checkpoint_path() -> Path:
    """Folder of the embedded checkpoint in Hugging Face layout.

    Raises BrokenCheckpoint when the installed package lacks one of its files.
    """
    folder = Path(__file__).resolve().parent / "checkpoint"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise BrokenCheckpoint(
            f"the embedded model lacks {', '.join(missing)}: reinstall the package, "
            "or train one with: python -m caesura.runtime.embedded.train --out FOLDER"
        )
    return folder
