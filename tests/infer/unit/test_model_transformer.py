"""Our transformer against transformers', on small seeded random models of each kind; and against itself, cut up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from lattica_infer.errors import CacheFullError, WeightsError
from lattica_infer.model.config import ModelConfig, stage_tensors
from lattica_infer.model.transformer import Stage

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama dynamic rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama yarn mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "llama llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "qwen3 bias": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}


@pytest.fixture(params=KINDS, scope="module")
def reference(request: pytest.FixtureRequest) -> Any:
    """A model of transformers' with weights that spread its logits."""
    name, options = KINDS[request.param]
    config = getattr(transformers, f"{name}Config")(**SIZES | options, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.2
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * spread + (parameter.dim() == 1)
            )
    return model


def ours(reference: Any, layers: range | None = None, *, packed: bool = True) -> Stage:
    config = ModelConfig.from_dict(reference.config.to_dict())
    return Stage(config, reference.state_dict(), layers or range(config.num_layers), packed=packed)


def ids(count: int, *, seed: int = 0, vocab: int = 97) -> torch.Tensor:
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packed", [True, False])
def test_logits_are_those_of_transformers(reference: Any, packed: bool) -> None:
    stage, prompt = ours(reference, packed=packed), ids(40)
    with torch.inference_mode():
        theirs = reference(prompt[None]).logits[0]
    mine = stage.forward(prompt, stage.new_cache(64))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4)


def test_greedy_tokens_are_those_of_transformers(reference: Any) -> None:
    stage, prompt = ours(reference), ids(20, seed=3)
    with torch.inference_mode():
        theirs = reference.generate(prompt[None], max_new_tokens=30, do_sample=False, eos_token_id=None)[
            0, 20:
        ]
    cache = stage.new_cache(64)
    token = stage.forward(prompt, cache)[-1].argmax()
    cache.commit(range(20))
    mine = []
    for _ in range(30):
        mine.append(int(token))
        token = stage.forward(token.view(1), cache)[-1].argmax()
        cache.commit([0])
    assert mine == theirs.tolist()


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_config_json_leaves_out_is_what_transformers_takes(kind: str) -> None:
    given = {"hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 32}
    given |= {"vocab_size": 97, "max_position_embeddings": 8192}
    for more in ({}, {"use_sliding_window": True}):
        theirs = getattr(transformers, f"{kind}Config")(**given, **more)
        absent = ModelConfig.from_dict({"model_type": kind.lower(), **given, **more})
        assert absent == ModelConfig.from_dict(theirs.to_dict())


@pytest.mark.parametrize("window", [None, 300])
def test_a_long_prompt_reads_as_in_transformers(window: int | None) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 2048, "initializer_range": 0.3, "sliding_window": window}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    stage, prompt = ours(model), ids(1100)  # more scores than are held at once
    with torch.inference_mode():
        theirs = model(prompt[None]).logits[0]
    whole = stage.forward(prompt, stage.new_cache(1100))
    torch.testing.assert_close(whole, theirs, rtol=1e-4, atol=1e-3)
    assert torch.equal(whole.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_cutting_a_model_into_stages_changes_no_bit(reference: Any, stages: int) -> None:
    whole, prompt = ours(reference), ids(20)
    expected = whole.forward(prompt, whole.new_cache(32))
    cuts = [round(5 * index / stages) for index in range(stages + 1)]
    x = prompt
    for start, end in itertools.pairwise(cuts):
        stage = ours(reference, range(start, end))
        x = stage.forward(x, stage.new_cache(32))
    assert torch.equal(x, expected)


def random_tree(nodes: int, seed: int) -> list[int]:
    """Parents of `nodes` nodes; more than one of them may continue the prefix."""
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(-1, node, (), generator=generator)) for node in range(nodes)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_node_of_a_tree_sees_its_own_path_and_nothing_else(reference: Any, seed: int) -> None:
    stage, prompt, tokens = ours(reference), ids(12, seed=seed), ids(14, seed=seed + 50)
    parents = random_tree(14, seed)
    cache = stage.new_cache(40)
    stage.forward(prompt, cache)
    cache.commit(range(12))
    tree = stage.forward(tokens, cache, torch.tensor(parents))
    for node in range(14):
        path = path_to(parents, node)
        chain = stage.new_cache(40)
        stage.forward(prompt, chain)
        chain.commit(range(12))
        alone = stage.forward(tokens[path], chain)[-1]
        torch.testing.assert_close(tree[node], alone, rtol=1e-4, atol=1e-4)
        assert tree[node].argmax() == alone.argmax()


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def test_a_committed_path_reads_like_text_that_was_always_there(reference: Any) -> None:
    stage, prompt, tokens = ours(reference), ids(12), ids(10, seed=9)
    parents = [-1, 0, 0, 2, 1, 3, 5, 2, 5, 8]
    cache, chain = stage.new_cache(40), stage.new_cache(40)
    for one in (cache, chain):
        stage.forward(prompt, one)
        one.commit(range(12))
    stage.forward(tokens, cache, torch.tensor(parents))
    path = path_to(parents, 9)
    cache.commit(path)
    stage.forward(tokens[path], chain)
    chain.commit(range(len(path)))
    following = ids(3, seed=4)
    torch.testing.assert_close(
        stage.forward(following, cache), stage.forward(following, chain), rtol=1e-4, atol=1e-4
    )


def test_a_prompt_in_chunks_gives_what_the_whole_gives(reference: Any) -> None:
    stage, prompt = ours(reference), ids(50)
    whole = stage.forward(prompt, stage.new_cache(64))[-1]
    cache = stage.new_cache(64)
    for chunk in prompt.split(16):
        last = stage.forward(chunk, cache)[-1]
        cache.commit(range(len(chunk)))
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def test_only_the_rows_asked_for_are_computed(llama: Any) -> None:
    stage, prompt = ours(llama), ids(9)
    every = stage.forward(prompt, stage.new_cache(16))
    some = stage.forward(prompt, stage.new_cache(16), rows=torch.tensor([8, 2]))
    none = stage.forward(prompt, stage.new_cache(16), rows=torch.empty(0, dtype=torch.int64))
    torch.testing.assert_close(some, every[[8, 2]])
    assert none.shape == (0, 97)


def test_a_cache_grows_up_to_its_rows_and_not_beyond(llama: Any) -> None:
    stage = ours(llama)
    small = stage.new_cache(100_000).memory_bytes
    cache = stage.new_cache(600)
    for _ in range(6):
        stage.forward(ids(100), cache)
        cache.commit(range(100))
    assert small < cache.memory_bytes
    with pytest.raises(CacheFullError, match="600 rows, 600 are taken"):
        stage.forward(ids(1), cache)
    assert cache.committed == 600


@pytest.mark.parametrize("path", [[1, 0], [0, 0], [-1], [4], [0, 4]])
def test_a_path_that_cannot_be_is_refused_and_nothing_is_lost(llama: Any, path: list[int]) -> None:
    stage = ours(llama)
    cache = stage.new_cache(16)
    stage.forward(ids(4), cache)
    with pytest.raises(ValueError, match="cannot commit"):
        cache.commit(path)
    assert (cache.committed, cache.scratch) == (0, 4)


def test_weights_that_do_not_fit_are_refused_by_name(llama: Any) -> None:
    config = ModelConfig.from_dict(llama.config.to_dict())
    weights = llama.state_dict()
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(WeightsError, match=rf"no tensor {name}"):
        Stage(config, {key: value for key, value in weights.items() if key != name}, range(5))
    with pytest.raises(WeightsError, match=rf"{name} is \[80, 47\], config.json says \[80, 48\]"):
        Stage(config, weights | {name: weights[name][:, 1:]}, range(5))
    Stage(config, {key: weights[key] for key in stage_tensors(config, range(3))}, range(3))


def test_layers_that_the_model_lacks_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="layers 3:6 are not in 0:5"):
        ours(llama, range(3, 6))


def test_bf16_on_disk_runs_as_fp32_on_a_cpu(llama: Any) -> None:
    config = ModelConfig.from_dict(llama.config.to_dict())
    halved = {name: tensor.bfloat16() for name, tensor in llama.state_dict().items()}
    restored = {name: tensor.float() for name, tensor in halved.items()}
    outputs = []
    for weights in (halved, restored):
        stage = Stage(config, weights, range(5))
        outputs.append(stage.forward(ids(8), stage.new_cache(8)))
        assert stage.numeric_class.startswith("cpu-fp32")
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "cpu-bf16"), (torch.float16, "cpu-fp16")])
def test_half_precision_is_near_fp32_and_of_a_class_of_its_own(
    llama: Any, dtype: torch.dtype, name: str
) -> None:
    config, weights, prompt = ModelConfig.from_dict(llama.config.to_dict()), llama.state_dict(), ids(30)
    exact, half = (Stage(config, weights, range(5), dtype=kind) for kind in (torch.float32, dtype))
    expected, got = (stage.forward(prompt, stage.new_cache(32)) for stage in (exact, half))
    assert half.numeric_class == name
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.gpu
def test_bf16_on_cuda_agrees_with_fp32_on_the_cpu(llama: Any) -> None:
    config, weights = ModelConfig.from_dict(llama.config.to_dict()), llama.state_dict()
    on_cpu, on_gpu = Stage(config, weights, range(5)), Stage(config, weights, range(5), device="cuda")
    assert on_gpu.numeric_class == "cuda-bf16"
    prompt = ids(30)
    expected = on_cpu.forward(prompt, on_cpu.new_cache(32))
    got = on_gpu.forward(prompt, on_gpu.new_cache(32)).cpu()
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
