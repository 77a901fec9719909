"""A .gguf file of llama.cpp's, converted to Hugging Face layout.

Architecture `llama` with a byte-level BPE tokenizer. Reading and dequantising are the `gguf` package's, of
llama.cpp's own authors. Three things differ between the two worlds: names, the order of q's and k's rows, and
where a tokenizer says how digits split.

Quantised tensors become float32, because that is what dequantising gives exactly; a rounding to bfloat16 on
top would be another model. Tensors in float32, float16 or bfloat16 keep their bytes.

Source: llama.cpp `convert_hf_to_gguf.py` (LlamaModel.permute) and `src/llama-vocab.cpp` (pre-tokenizers).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from lattica_infer.errors import WeightsError
from lattica_infer.model import files
from lattica_infer.model.sources.progress import Progress
from lattica_infer.model.tensor_file import TensorSpec, canonical_header, canonical_order

_TOP: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_KEPT: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # stored as they are; the rest is dequantised

# Pre-tokenizers that are GPT-2's regex, with and without every digit by itself before it.
_PLAIN_PRE: Final = {"gpt-2"}
_DIGITS_PRE: Final = {"smollm", "starcoder", "refact", "command-r"}

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def convert_gguf(path: Path, target: Path, progress: Progress) -> None:
    """Write the model of a .gguf file into the folder `target`.

    Raises:
        WeightsError: the file is damaged, or of an architecture or tokenizer that we don't convert.
    """
    try:
        source = _Source(GGUFReader(path))
        _require_convertible(source)
        _write_json(target / files.CONFIG, _config(source))
        _write_json(target / files.GENERATION_CONFIG, _token_ids(source))
        _write_json(target / files.TOKENIZER_CONFIG, _tokenizer_config(source))
        _write_json(target / files.TOKENIZER, _tokenizer(source))
        _write_weights(source, target / files.WEIGHTS, progress)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"cannot convert {path}: {error.strerror or error}") from error
    except Exception as error:  # the reader trusts the file: damage surfaces as whatever numpy says
        raise WeightsError(
            f"{path} is damaged or no GGUF file ({type(error).__name__}: {str(error)[:200]}); fetch it again"
        ) from error


@dataclass(frozen=True, slots=True)
class _Source:
    """A GGUF file's metadata and tensors."""

    reader: GGUFReader

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise WeightsError(f"the GGUF file has no {key}; it is damaged or from an old llama.cpp")
        return value


def _require_convertible(source: _Source) -> None:
    architecture = source.need("general.architecture")
    if architecture != "llama":
        raise WeightsError(
            f"the GGUF file's architecture is {architecture!r}; only 'llama' is converted: "
            "import the model's safetensors folder instead"
        )
    if source.get("llama.expert_count"):
        raise WeightsError("the GGUF file holds a mixture of experts; only dense models run")
    if source.get("llama.rope.scaling.type", "none") != "none":
        raise WeightsError(
            f"the GGUF file scales rotary positions ({source.get('llama.rope.scaling.type')}); "
            "import the model's safetensors folder instead"
        )
    kind, pre = source.need("tokenizer.ggml.model"), source.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PLAIN_PRE | _DIGITS_PRE:
        known = ", ".join(sorted(_PLAIN_PRE | _DIGITS_PRE))
        raise WeightsError(
            f"the GGUF file's tokenizer is {kind!r} with pre-tokenizer {pre!r}; converted are 'gpt2' with "
            f"{known}: import the model's safetensors folder instead"
        )


def _config(source: _Source) -> dict[str, Any]:
    hidden = source.need("llama.embedding_length")
    heads = source.need("llama.attention.head_count")
    names = {tensor.name for tensor in source.reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "head_dim": source.get("llama.attention.key_length", hidden // heads),
        "num_hidden_layers": source.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.get("llama.attention.head_count_kv", heads),
        "intermediate_size": source.need("llama.feed_forward_length"),
        "vocab_size": len(source.need("tokenizer.ggml.tokens")),
        "max_position_embeddings": source.need("llama.context_length"),
        # float32 in the file: nine digits are the shortest decimal that most models were written with
        "rms_norm_eps": round(source.need("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": source.get("llama.rope.freq_base", 10_000.0),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in names,
        **_token_ids(source),
    }


def _token_ids(source: _Source) -> dict[str, int]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: source.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def _tokenizer_config(source: _Source) -> dict[str, Any]:
    tokens = source.need("tokenizer.ggml.tokens")
    named = {
        "bos_token": source.get("tokenizer.ggml.bos_token_id"),
        "eos_token": source.get("tokenizer.ggml.eos_token_id"),
        "pad_token": source.get("tokenizer.ggml.padding_token_id"),
        "unk_token": source.get("tokenizer.ggml.unknown_token_id"),
        "chat_template": source.get("tokenizer.chat_template"),
    }
    settings = {
        name: tokens[value] if isinstance(value, int) else value
        for name, value in named.items()
        if value is not None
    }
    return settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(source.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.need("llama.context_length"),
    }


def _tokenizer(source: _Source) -> dict[str, Any]:
    """tokenizer.json, written out here: what the `tokenizers` library saves changes with its version, and the
    model's Cid with it."""
    tokens, kinds = source.need("tokenizer.ggml.tokens"), source.need("tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    by_digit = source.get("tokenizer.ggml.pre") in _DIGITS_PRE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token_id, token, special=kind == _CONTROL)
            for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, byte_level] if by_digit else [byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in source.need("tokenizer.ggml.merges")],
        },
    }


def _added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _write_weights(source: _Source, path: Path, progress: Progress) -> None:
    """One canonical safetensors file, tensor by tensor: no more than one is in memory."""
    by_name = {_hf_name(tensor.name): tensor for tensor in source.reader.tensors}
    specs = [_spec(name, tensor) for name, tensor in by_name.items()]
    total, done = sum(spec.size_bytes for spec in specs), 0
    with path.open("wb") as file:
        file.write(canonical_header(specs))
        for spec in canonical_order(specs):
            for block in _blocks(source, by_name[spec.name]):
                done += file.write(block)
            progress(done, total)


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match name.split("."):
        case ["blk", index, part, suffix] if index.isascii() and index.isdecimal() and part in _IN_LAYER:
            return f"model.layers.{int(index)}.{_IN_LAYER[part]}.{suffix}"
    raise WeightsError(
        f"the GGUF file has a tensor {name[:80]!r} that no plain Llama has; it can't be converted"
    )


def _spec(name: str, tensor: ReaderTensor) -> TensorSpec:
    shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts dimensions from the innermost
    return TensorSpec(name, _KEPT.get(tensor.tensor_type.name, "F32"), shape)


def _blocks(source: _Source, tensor: ReaderTensor) -> Iterator[memoryview]:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    values: NDArray[Any]
    if tensor.tensor_type is GGMLQuantizationType.BF16:  # numpy knows no bfloat16: the reader gives its bytes
        values = tensor.data.view(np.uint16).reshape(shape)
    elif tensor.tensor_type.name in _KEPT:
        values = tensor.data.reshape(shape)
    else:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    if ".attn_q." in tensor.name:
        values = _unpermute(values, source.need("llama.attention.head_count"))
    if ".attn_k." in tensor.name:
        values = _unpermute(values, source.get("llama.attention.head_count_kv"))
    yield np.ascontiguousarray(values).data.cast("B")


def _unpermute(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's order of rows, in which the two halves of a rotated pair are neighbours.

    Hugging Face's rotation pairs row i of a head with row i + head_dim / 2.
    """
    out = rows.shape[0]
    paired = rows.reshape(heads, out // heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
