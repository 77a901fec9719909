"""config.json in its many spellings, and in spellings that nobody should get away with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica_infer.errors import WeightsError
from lattica_infer.model.config import ModelConfig, layer_tensors, stage_tensors
from lattica_infer.model.rope import Rope

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000,
    "tie_word_embeddings": True,
}


def test_smollm2_has_its_published_size() -> None:
    config = ModelConfig.from_dict(GOOD)
    assert config.parameters == 134_515_008
    assert config.head_dim == 64
    assert config.rope == Rope(100_000.0)


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_both_spellings_of_rope_settings_mean_the_same(kind: str) -> None:
    old = GOOD | {"rope_scaling": SCALINGS[kind] | {"type": kind}}
    new = {key: value for key, value in GOOD.items() if key != "rope_theta"}
    new |= {"rope_parameters": SCALINGS[kind] | {"rope_type": kind, "rope_theta": 100_000.0}}
    rope = ModelConfig.from_dict(new).rope
    assert ModelConfig.from_dict(old).rope == rope
    assert ModelConfig.from_dict(old | new).rope == rope
    assert rope.theta == 100_000.0


def test_two_spellings_that_disagree_are_refused() -> None:
    # As when somebody adds a model card's rope_scaling to a file that a newer library wrote.
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    }
    with pytest.raises(WeightsError, match="rope_parameters and rope_scaling that disagree"):
        ModelConfig.from_dict(GOOD | both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "architecture 'gpt_neox' is not one we run: we know llama"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only silu"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2: it must divide num_attention_heads, 9"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: it must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
        ({"head_dim": 7}, "head_dim = 7: RoPE turns pairs"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_type = 'longrope': we know default"),
        ({"rope_scaling": {"type": "linear"}}, "rope factor = 'None'"),
        ({"rope_theta": 10**400}, "rope_theta"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters for 'full_attention' alone",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': it must be true or false"),
        ({"rms_norm_eps": -1}, "rms_norm_eps = -1"),
        ({"layer_types": ["chunked_attention"] * 30}, "layer_types"),
    ],
)
def test_a_setting_we_cannot_run_is_named_with_its_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message.replace("(", r"\(")):
        ModelConfig.from_dict(GOOD | change)


def test_windows_begin_where_the_model_says() -> None:
    qwen = GOOD | {"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 28}
    assert set(ModelConfig.from_dict(qwen).windows) == {None}
    assert ModelConfig.from_dict(qwen | {"use_sliding_window": True}).windows == (None,) * 28 + (64, 64)
    types = ["sliding_attention", "full_attention"] * 15
    mixed = GOOD | {"model_type": "mistral", "sliding_window": 64, "layer_types": types}
    assert ModelConfig.from_dict(mixed).windows == (64, None) * 15


def test_the_ends_of_a_model_are_with_its_first_and_last_layers() -> None:
    config = ModelConfig.from_dict(GOOD)
    first, middle, last = (stage_tensors(config, range(*ends)) for ends in ((0, 10), (10, 20), (20, 30)))
    assert "model.embed_tokens.weight" in first
    assert middle == {
        name: shape for layer in range(10, 20) for name, shape in layer_tensors(config, layer).items()
    }
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(last)
    untied = stage_tensors(ModelConfig.from_dict(GOOD | {"tie_word_embeddings": False}), range(20, 30))
    assert "lm_head.weight" in untied
    assert "model.embed_tokens.weight" not in untied


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [*GOOD, "head_dim", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "attention_bias"]
)
SCALING = st.dictionaries(
    st.sampled_from(
        ["rope_type", "factor", "beta_fast", "mscale", "mscale_all_dim", "truncate", "rope_theta"]
    ),
    VALUES | st.sampled_from(["yarn", "llama3", "linear", 2.0]),
)


@given(st.dictionaries(NAMES, VALUES | SCALING, max_size=4))
def test_a_mutated_config_is_read_or_refused_and_nothing_else(changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict(GOOD | changes)
    except WeightsError:
        return
    assert stage_tensors(config, range(config.num_layers))
    assert len(config.rope.inverse_frequencies(min(config.head_dim, 256))) == min(config.head_dim, 256) // 2
