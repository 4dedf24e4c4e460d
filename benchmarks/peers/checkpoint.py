"""The random checkpoint that every system loads: a Llama in Hugging Face's layout, whole, or in int8 for vLLM.

The tokenizer has exactly as many tokens as the model, since a system may refuse to sample ids it cannot spell; its
merges are made up, as nothing here is ever text.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import tensor_shapes
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.peers.roofline import Shape

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
MAX_CONTEXT_TOKENS = 8192
DONE = "complete"  # written last


def model_config(shape: Shape) -> dict[str, object]:
    """``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 3,
        "torch_dtype": "float32",
    }


def write_checkpoint(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """The float32 checkpoint at ``folder``; one that is complete is kept."""
    if (folder / DONE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    _write_texts(folder, config, shape)
    (folder / DONE).touch()
    return folder


def write_int8(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """The same weights rounded to int8 per output channel, activations per token, as vLLM reads it."""
    if (folder / DONE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in _weights(config, seed).items():
        if "_proj." not in name:
            tensors[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127  # [out, 1]
        tensors[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    side = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**side, "strategy": "channel", "dynamic": False},
                "input_activations": {**side, "strategy": "token", "dynamic": True},
            }
        },
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_texts(folder, config, shape)
    (folder / DONE).touch()
    return folder


def make_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of ``vocab`` tokens: special ones, bytes, then pairs and triples of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(SPECIAL) + alphabet
    letters = [letter for letter in alphabet if letter.isascii() and letter.isprintable()]
    pairs = list(product(letters, letters))
    grown = [(left + right, letter) for (left, right), letter in product(pairs, letters)]
    merges = (pairs + grown)[: vocab - len(tokens)]
    tokens += [left + right for left, right in merges]
    if len(tokens) != vocab:
        raise ValueError(f"vocab is {vocab}; it must lie between {len(SPECIAL) + len(alphabet)} and {len(tokens)}")
    numbered = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=numbered, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _write_texts(folder: Path, config: dict[str, object], shape: Shape) -> None:
    make_tokenizer(shape.vocab).save(str(folder / "tokenizer.json"))
    bos, eos, unknown, padding = SPECIAL
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unknown,
        "pad_token": padding,
        "model_max_length": MAX_CONTEXT_TOKENS,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
    for name, document in (
        ("config", config),
        ("tokenizer_config", about),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def _weights(config: dict[str, object], seed: int) -> dict[str, torch.Tensor]:
    """Normal, 1 / sqrt(fan in): at this scale the layers, not the embeddings, decide what comes next."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(parse_config(config)).items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)
    return tensors
