"""A tiny model with random weights, as a Hugging Face folder: fast enough for every test.

The tensor names and shapes are written out here, not taken from the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as SmolLM2 has them
CORPUS = [
    "The mesh wakes when the first peer dials another, and the mesh sleeps when the last one leaves.",
    "def walk(tree, rows):\n    for node in tree:\n        yield node\n",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are tiny.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(
    folder: Path,
    *,
    kind: str = "llama",
    layers: int = 5,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 128,
    vocab: int = 300,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    files: int = 1,
    chat: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write the model to `folder` and give it back.

    Weights are drawn so that logits are spread and greedy text doesn't stand still. `files` above 1 splits
    them over so many files with an index; `config` overrides keys of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": hidden,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", settings | config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2]})
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = _shapes(kind, layers, hidden, q, kv, head_dim, intermediate, vocab)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    _write_weights(folder, _draw(shapes, dtype, seed), files)
    tiny_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    if chat:
        tokenizer["chat_template"] = CHAT_TEMPLATE
    _write_json(folder / "tokenizer_config.json", tokenizer)
    return folder


def tiny_tokenizer(vocab: int = 300) -> Tokenizer:
    """A byte-level BPE with at most `vocab` ids: three special tokens, 256 bytes, and merges from CORPUS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _shapes(
    kind: str, layers: int, hidden: int, q: int, kv: int, head_dim: int, intermediate: int, vocab: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        part = {
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if kind == "qwen2":
            widths = {"q": q, "k": kv, "v": kv}
            part |= {f"self_attn.{name}_proj.bias": (size,) for name, size in widths.items()}
        if kind == "qwen3":
            part |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in ("q", "k")}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in part.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def _draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * noise
        return noise * shape[-1] ** -0.5 if len(shape) == 2 else 0.1 * noise

    return {name: tensor(name, shape).to(dtype) for name, shape in shapes.items()}


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = list(tensors)
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        mine = names[number::files]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
