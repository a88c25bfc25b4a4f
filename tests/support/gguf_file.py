"""A tiny Gemma 3 as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import keras
import numpy as np
import sentencepiece

from tests.support import tiny_presets


def write_gguf(path: Path, backbone, kind: str, *, metadata: dict | None = None, without: str = "") -> Path:
    """Write a backbone as a GGUF file the way llama.cpp's converter lays it out."""
    config = backbone.get_config()
    writer = gguf.GGUFWriter(path, (metadata or {}).get("architecture", "gemma3"))
    writer.add_block_count(config["num_layers"])
    writer.add_embedding_length(config["hidden_dim"])
    writer.add_feed_forward_length(config["intermediate_dim"])
    writer.add_head_count(config["num_query_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(config["sliding_window_size"])
    writer.add_rope_freq_base((metadata or {}).get("rope", 1.0e6))

    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny_presets.tiny_proto())
    types, tokens = [], []
    for number in range(pieces.vocab_size()):
        token = pieces.id_to_piece(number)
        user_defined = token in (*tiny_presets.TURNS, "\n", "\n\n", "▁▁")
        special = number < 4
        types.append(3 if special else 6 if pieces.is_byte(number) else 4 if user_defined else 1)
        tokens.append(token.replace("▁", " ") if user_defined else token)
    writer.add_tokenizer_model((metadata or {}).get("tokenizer", "llama"))
    writer.add_token_list(tokens)
    writer.add_token_scores([pieces.get_score(number) for number in range(pieces.vocab_size())])
    writer.add_token_types(types)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)

    kind_number = gguf.GGMLQuantizationType[kind]
    for weight in backbone.weights:
        name = gguf_name(weight.path)
        values = numpy_of(weight)
        if weight.path.endswith("scale"):
            values = values + np.float32(1)
        elif "attention_output" in weight.path:
            values = np.ascontiguousarray(values.reshape(-1, values.shape[-1]).T)
        elif values.ndim == 3:
            values = np.ascontiguousarray(np.concatenate([head.T for head in values]))
        elif "ffw" in weight.path:
            values = np.ascontiguousarray(values.T)
        if name == without:
            continue
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind_number), raw_dtype=kind_number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numpy_of(weight) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(weight))


def gguf_name(path: str) -> str:
    """Return llama.cpp's name of a Keras weight."""
    if not path.startswith("decoder_block"):
        return {"token_embedding": "token_embd.weight", "final_normalization": "output_norm.weight"}[path.split("/")[0]]
    block, *_, layer, _ = path.split("/")
    names = {
        "pre_attention_norm": "attn_norm",
        "query": "attn_q",
        "key": "attn_k",
        "value": "attn_v",
        "query_norm": "attn_q_norm",
        "key_norm": "attn_k_norm",
        "attention_output": "attn_output",
        "pre_ffw_norm": "ffn_norm",
        "ffw_gating": "ffn_gate",
        "ffw_gating_2": "ffn_up",
        "ffw_linear": "ffn_down",
    }
    return f"blk.{block.rsplit('_', 1)[1]}.{names.get(layer, layer)}.weight"
