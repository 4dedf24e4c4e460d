"""Models with random weights, for measuring what a real engine costs. They need no download and mean nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caesura.runtime.embedded import checkpoint_path

SHAPES = {  # hidden, layers, heads, KV heads, intermediate, vocabulary
    "15M": (288, 6, 6, 6, 768, 32000),
    "135M": (576, 30, 9, 3, 1536, 49152),
    "8B": (4096, 32, 32, 8, 14336, 128256),  # Llama 3's; for a GPU
}
VOCAB = min(shape[-1] for shape in SHAPES.values())
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def llama_config(name: str) -> dict[str, object]:
    """``config.json`` of a Llama of that size. ValueError names the sizes."""
    if name not in SHAPES:
        raise ValueError(f"model is {name!r}; it must be one of {', '.join(SHAPES)}")
    hidden, layers, heads, kv_heads, intermediate, vocab = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": name != "8B",
    }


@contextmanager
def dummy_checkpoint(name: str) -> Iterator[Path]:
    """A folder to load with ``load_format="dummy"``: that config, and the embedded model's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(llama_config(name)))
        for file in _TOKENIZER:
            shutil.copy(checkpoint_path() / file, path / file)
        yield path
