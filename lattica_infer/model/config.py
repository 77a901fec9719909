"""What a model is: the sizes and switches of a config.json, and the tensors that follow from them. No torch.

Four kinds of decoder share this code: Llama (arXiv 2302.13971), Mistral (2310.06825), Qwen2 (2407.10671) and
Qwen3 (2505.09388). They differ in biases, in norms on queries and keys, and in sliding windows. A setting that
would change the result and that we don't know is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from lattica_infer.errors import WeightsError
from lattica_infer.model.rope import Rope

_T = TypeVar("_T", int, float, bool)

MAX_LAYERS: Final = 1024  # Llama 3.1 405B has 126
MAX_WIDTH: Final = 1 << 20  # of any hidden, head or feed-forward dimension; 405B's widest has 53,248
MAX_VOCAB: Final = 1 << 22  # Gemma has 262,144
MAX_CONTEXT: Final = 1 << 24  # positions stay exact in float32 up to here

# Settings that change the result and that no model of ours may have: name -> values that mean "not used".
_REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "position_embedding_type": (None, "rotary"),
}

# What a kind's settings are where config.json doesn't say, if that isn't the same for all (transformers' classes).
_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
KINDS: Final = tuple(_DEFAULTS)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer. Sizes are counts; names follow config.json where it has a good one."""

    kind: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # positions that the model was made for
    norm_eps: float
    rope: Rope
    tied: bool  # the head is the embedding
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head's query and key, before RoPE
    windows: tuple[int | None, ...]  # per layer: keys at most that many positions back, itself included

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json.

        Raises:
            WeightsError: a setting is missing, out of range, or of a kind that we cannot run.
        """
        kind = settings.get("model_type")
        if kind not in KINDS:
            raise WeightsError(f"architecture {_shown(kind)} is not one we run: we know {', '.join(KINDS)}")
        settings = {**_DEFAULTS[kind], **settings}
        for name, unused in _REFUSED.items():
            if name in settings and settings[name] not in unused:
                _refuse(name, settings[name], "models with it are not supported")
        if settings.get("hidden_act", "silu") not in ("silu", "swish"):
            _refuse("hidden_act", settings["hidden_act"], "only silu is supported")
        hidden_size = _count(settings, "hidden_size", MAX_WIDTH)
        num_heads = _count(settings, "num_attention_heads", MAX_WIDTH)
        num_kv_heads = _count(settings, "num_key_value_heads", MAX_WIDTH, default=num_heads)
        if num_heads % num_kv_heads:
            _refuse("num_key_value_heads", num_kv_heads, f"it must divide num_attention_heads, {num_heads}")
        head_dim = _count(settings, "head_dim", MAX_WIDTH, default=hidden_size // num_heads)
        if head_dim % 2:
            _refuse("head_dim", head_dim, "RoPE turns pairs, so it must be even")
        num_layers = _count(settings, "num_hidden_layers", MAX_LAYERS)
        context_length = _count(settings, "max_position_embeddings", MAX_CONTEXT)
        attention_bias = _switch(settings, "attention_bias")
        return cls(
            kind=kind,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=_count(settings, "intermediate_size", MAX_WIDTH),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=_count(settings, "vocab_size", MAX_VOCAB),
            context_length=context_length,
            norm_eps=_norm_eps(settings),
            rope=Rope.from_dict(settings, context_length),
            tied=_switch(settings, "tie_word_embeddings"),
            qkv_bias=kind == "qwen2" or (kind in ("llama", "qwen3") and attention_bias),
            out_bias=kind in ("llama", "qwen3") and attention_bias,
            mlp_bias=kind == "llama" and _switch(settings, "mlp_bias"),
            qk_norm=kind == "qwen3",
            windows=_windows(settings, kind, num_layers),
        )

    @property
    def parameters(self) -> int:
        """How many numbers the model has; a tied head counts once."""
        return sum(_size(shape) for shape in stage_tensors(self, range(self.num_layers)).values())


Shape = tuple[int, ...]


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """The tensors of one decoder layer, by Hugging Face's names; weights are [out, in]."""
    prefix = f"model.layers.{layer}."
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qkv_bias:
        shapes |= {
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.bias": (kv,),
        }
    if config.out_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.mlp_bias:
        shapes |= {
            "mlp.gate_proj.bias": (inner,),
            "mlp.up_proj.bias": (inner,),
            "mlp.down_proj.bias": (hidden,),
        }
    if config.qk_norm:
        shapes |= {
            "self_attn.q_norm.weight": (config.head_dim,),
            "self_attn.k_norm.weight": (config.head_dim,),
        }
    return {prefix + name: shape for name, shape in shapes.items()}


def stage_tensors(config: ModelConfig, layers: range) -> dict[str, Shape]:
    """The tensors that a stage of these layers holds.

    The stage with layer 0 has the embedding, the one with the last layer the final norm and the head; a tied
    head is the embedding, which is then in both.
    """
    shapes: dict[str, Shape] = {}
    if 0 in layers:
        shapes["model.embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
    for layer in layers:
        shapes |= layer_tensors(config, layer)
    if config.num_layers - 1 in layers:
        head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        shapes |= {"model.norm.weight": (config.hidden_size,), head: (config.vocab_size, config.hidden_size)}
    return shapes


def _windows(settings: Mapping[str, Any], kind: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer. Qwen slides only if told to, and only above `max_window_layers`."""
    used = settings.get("sliding_window") is not None and (
        kind == "mistral" or (kind in ("qwen2", "qwen3") and _switch(settings, "use_sliding_window"))
    )
    if not used:
        if "sliding_attention" in _layer_types(settings, num_layers):
            _refuse("layer_types", "sliding_attention", "it needs a sliding_window")
        return (None,) * num_layers
    window = _count(settings, "sliding_window", MAX_CONTEXT)
    types = _layer_types(settings, num_layers)
    if types:
        return tuple(window if one == "sliding_attention" else None for one in types)
    first = 0 if kind == "mistral" else _count(settings, "max_window_layers", MAX_LAYERS, default=28, least=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _layer_types(settings: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    types = settings.get("layer_types")
    if types is None:
        return ()
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(one not in known for one in types):
        _refuse("layer_types", types, f"we know {' and '.join(known)}, one for each layer")
    return tuple(types)


def _norm_eps(settings: Mapping[str, Any]) -> float:
    value = settings.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        _refuse("rms_norm_eps", value, "it must be a small number, such as 1e-05")
    return float(value)


def _count(
    settings: Mapping[str, Any], name: str, most: int, *, default: int | None = None, least: int = 1
) -> int:
    value = settings.get(name)
    if value is None:
        value = default
    if value is None:
        raise WeightsError(f"config.json lacks {name}")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        _refuse(name, value, f"it must be a whole number from {least} to {most}")
    return value


def _switch(settings: Mapping[str, Any], name: str) -> bool:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, value, "it must be true or false")
    return bool(value)


def _refuse(name: str, value: object, reason: str) -> NoReturn:
    raise WeightsError(f"config.json has {name} = {_shown(value)}: {reason}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _size(shape: Shape) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
