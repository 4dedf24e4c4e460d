"""A Hugging Face Llama as a GGUF file. ``python -m benchmarks.peers.gguf_file FOLDER FILE f32|q8_0``, in llama.cpp's
environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(folder: Path, file: Path, width: str) -> None:
    """Write ``file``. Matrices in ``width``, norms in float32."""
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Width
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, gguf, config, json.loads((folder / "tokenizer.json").read_text()))
    writer.add_file_type(7 if width == "q8_0" else 0)

    def put(name: str, values: Any) -> None:
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim > 1 and width == "q8_0":
            writer.add_tensor(name, gguf.quants.quantize(values, Width.Q8_0), raw_dtype=Width.Q8_0)
        else:
            writer.add_tensor(name, values)

    put("token_embd.weight", weights["model.embed_tokens.weight"])
    put("output_norm.weight", weights["model.norm.weight"])
    if "lm_head.weight" in weights:
        put("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in NAMES.items():
            values = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                values = _interleaved(values, config["num_attention_heads"])
            if ours == "attn_k":
                values = _interleaved(values, config["num_key_value_heads"])
            put(f"blk.{layer}.{ours}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(values: Any, heads: int) -> Any:
    """GGUF's Llama rotates neighbours, the checkpoint's rotates halves: reorder the rows of every head."""
    rows, columns = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, columns)  # [heads, half, pair, hidden]
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _describe(writer: Any, gguf: Any, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
