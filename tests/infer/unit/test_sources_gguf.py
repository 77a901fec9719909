"""GGUF files: written with llama.cpp's own package from a tiny model, converted back to the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lattica_infer.errors import WeightsError
from lattica_infer.model.sources import import_model
from lattica_infer.model.text import Tokenizer
from lattica_infer.weights.store import ModelStore

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"attn_q": 4, "attn_k": 2}


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q's and k's rows: `permute` in convert_hf_to_gguf.py."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def write_gguf(
    folder: Path,
    path: Path,
    *,
    architecture: str = "llama",
    kind: str = "gpt2",
    pre: str = "smollm",
    quantised: gguf.GGMLQuantizationType | None = None,
    extra: dict[str, Any] | None = None,
    rename: Callable[[str], str] = gguf_name,
) -> Path:
    """The tiny model of `folder` as a GGUF file."""
    settings = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 4) + [4])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items():
        target = rename(name)
        is_bf16 = tensor.dtype == torch.bfloat16
        rows = tensor.view(torch.int16).numpy().view(np.uint16) if is_bf16 else tensor.numpy()
        heads = HEADS.get(target.split(".")[2]) if target.startswith("blk.") else None
        rows = rows if heads is None else interleaved(rows, heads)
        rows = np.ascontiguousarray(rows)
        if is_bf16:
            shape, kind_of = rows.shape, gguf.GGMLQuantizationType.BF16
            writer.add_tensor(
                target, rows.view(np.uint8), raw_shape=(*shape[:-1], shape[-1] * 2), raw_dtype=kind_of
            )
        elif quantised is not None and rows.ndim == 2:
            writer.add_tensor(target, gguf.quantize(rows, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(target, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unquantised_weights_come_back_bit_for_bit(
    store: ModelStore, make_tiny_model: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    folder = make_tiny_model(dtype=dtype, tied=tied)
    imported = import_model(write_gguf(folder, tmp_path / "Tiny Model.gguf"), store)
    assert imported.name == "Tiny-Model"
    expected = safetensors.torch.load_file(folder / "model.safetensors")
    actual = safetensors.torch.load_file(imported.folder / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(actual[name].dtype == dtype for name in actual)
    assert all(actual[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_quantised_weights_become_what_they_stand_for(
    store: ModelStore, tiny_model: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    imported = import_model(write_gguf(tiny_model, tmp_path / "t.gguf", quantised=kind), store)
    original = safetensors.torch.load_file(tiny_model / "model.safetensors")
    actual = safetensors.torch.load_file(imported.folder / "model.safetensors")
    for name, tensor in original.items():
        rows = tensor.numpy()
        if rows.ndim == 2:  # rows are quantised one by one, so their order does not change their values
            rows = gguf.dequantize(gguf.quantize(rows, kind), kind)
        assert torch.equal(actual[name], torch.from_numpy(rows)), name


def test_the_configuration_comes_back(store: ModelStore, tiny_model: Path, tmp_path: Path) -> None:
    imported = import_model(write_gguf(tiny_model, tmp_path / "t.gguf"), store)
    expected = json.loads((tiny_model / "config.json").read_text())
    actual = json.loads((imported.folder / "config.json").read_text())
    shared = actual.keys() & expected.keys()
    assert shared > {"hidden_size", "head_dim", "rms_norm_eps", "rope_theta", "num_key_value_heads"}
    assert {name: actual[name] for name in shared} == {name: expected[name] for name in shared}


def test_the_tokenizer_comes_back_with_digits_apart(
    store: ModelStore, tiny_model: Path, tmp_path: Path
) -> None:
    original = Tokenizer(tiny_model)
    by_digit = Tokenizer(import_model(write_gguf(tiny_model, tmp_path / "t.gguf"), store).folder)
    plain = Tokenizer(import_model(write_gguf(tiny_model, tmp_path / "p.gguf", pre="gpt-2"), store).folder)
    text = "The mesh wakes 😀 <|im_end|>\n"
    assert by_digit.encode(text) == plain.encode(text) == original.encode(text)
    assert (by_digit.end_ids, by_digit.vocab_size) == ({2}, 300)
    messages = [{"role": "user", "content": text}]
    assert by_digit.chat(messages) == original.chat(messages)
    library = tokenizers.Tokenizer.from_file(str(by_digit.folder / "tokenizer.json"))
    split = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str("a 123")]
    assert split == ["a", "Ġ", "1", "2", "3"]


def test_a_user_defined_token_is_matched_in_plain_text(
    store: ModelStore, tiny_model: Path, tmp_path: Path
) -> None:
    imported = import_model(write_gguf(tiny_model, tmp_path / "t.gguf"), store)
    library = tokenizers.Tokenizer.from_file(str(imported.folder / "tokenizer.json"))
    last = library.id_to_token(299)
    assert not library.get_added_tokens_decoder()[299].special
    assert 299 in Tokenizer(imported.folder).encode(last)


def test_progress_ends_at_all_bytes(store: ModelStore, tiny_model: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    path = write_gguf(tiny_model, tmp_path / "t.gguf")
    imported = import_model(path, store, progress=lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports)
    assert reports[-1] == (imported.manifest.parameters * 4, imported.manifest.parameters * 4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        ({"kind": "llama"}, "tokenizer is 'llama'"),
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'"),
        ({"extra": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"rename": lambda name: gguf_name(name).replace("ffn_up", "ffn_sideways")}, "ffn_sideways"),
        ({"rename": lambda name: gguf_name(name).replace("output_norm", "rope_freqs")}, "rope_freqs"),
    ],
)
def test_what_is_not_converted_is_named(
    store: ModelStore, tiny_model: Path, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = write_gguf(tiny_model, tmp_path / "t.gguf", **change)
    with pytest.raises(WeightsError, match=complaint):
        import_model(path, store)
    assert store.list() == []


@settings(max_examples=30)
@given(st.data())
def test_a_damaged_file_is_a_weights_error_or_another_model(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(write_gguf(tiny_model, folder / "whole.gguf").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 20))):
            content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    (folder / "damaged.gguf").write_bytes(content)
    try:
        imported = import_model(folder / "damaged.gguf", ModelStore(folder / "cache"))
    except WeightsError:
        return
    assert imported.manifest.parameters > 0
