"""GGUF files for tests, made from a folder with a Llama as llama.cpp's converter would make them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_gguf(
    folder: Path,
    file: Path,
    dtype: torch.dtype = torch.float32,
    rope_freqs: Any = None,
    **more: Any,
) -> Path:
    """Write the Llama in `folder` and its tokenizer; `more` are further entries, with two underscores for each dot."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in more.items():
        writer.add_key_value(
            key.replace("__", "."),
            value,
            {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}.get(
                type(value), gguf.GGUFValueType.STRING
            ),
        )
    _add_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for projection, count in heads.items():
            if f".{projection}." in name:
                weight = _interleaved(weight, count)
        kept = torch.float32 if weight.dim() == 1 else dtype  # norms always stay in float32
        to = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(to, weight.to(kept).numpy())
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", numpy.asarray(rope_freqs, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_strange(file: Path, architecture: str = "llama", **more: Any) -> Path:
    """A file with a few entries and no weights."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in more.items():
        kind = gguf.GGUFValueType.UINT16 if isinstance(value, int) else gguf.GGUFValueType.STRING
        writer.add_key_value(key.replace("__", "."), value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection in llama.cpp's order: the two of a rotation are adjacent."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in stored["added_tokens"]}
    vocabulary = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[i in special] for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
