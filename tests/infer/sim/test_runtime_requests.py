"""What a program may ask of a generation, what it is told, and what it gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from trio.testing import MockClock

from lattica_infer.errors import InferenceError
from lattica_infer.model.transformer import Stage
from lattica_infer.weights.loading import load_stage_tensors

PROMPT = [7, 90, 33, 33, 90, 7, 12]


@pytest.mark.parametrize(
    ("prompt", "settings", "reason"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([1, 300], {}, "token 1 of the prompt is 300: ids are 0 to 299"),
        ([1, -1], {}, "token 1 of the prompt is -1"),
        ([1, 2.5], {}, "a prompt is text or a list of token ids"),
        (PROMPT, {"max_tokens": 0}, "max_tokens is 0: take 1 or more"),
        (PROMPT, {"seed": -1}, "the seed -1 is out of range"),
        (PROMPT, {"seed": 1.5}, "seed is 1.5: take a whole number"),
        (PROMPT, {"top_k": True}, "top_k is True: take a whole number"),
        (PROMPT, {"temperature": "hot"}, "temperature is 'hot': take a number"),
        (PROMPT, {"stop": [7]}, r"stop takes strings, not \[7\]"),
        (PROMPT, {"seed": 2**64}, "out of range: take 0 to 2"),
        (PROMPT, {"temperature": -1.0}, "temperature -1.0 is out of range"),
        (PROMPT, {"temperature": math.nan}, "temperature nan is out of range"),
        (PROMPT, {"top_p": 0.0}, "top_p 0.0 is out of range"),
        (PROMPT, {"top_k": -1}, "top_k -1 is out of range"),
        (PROMPT, {"drafter": "oracle"}, "no drafter is named 'oracle': known are none, suffix, auto"),
        (PROMPT, {"stop": [""]}, "stop takes at most"),
        (PROMPT, {"relaxed": 0.5}, "relaxed=0.5 is not available in this version"),
        (PROMPT, {"audit": 0.1}, "audit=0.1 is not available in this version"),
    ],
)
async def test_a_value_out_of_range_is_named_before_anything_is_opened(
    prompt: Any, settings: dict[str, Any], reason: str, open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(1)
        mesh = await swarm.mesh()
        with pytest.raises(InferenceError, match=reason):
            mesh.generate(prompt, **settings)


async def test_a_prompt_that_fills_the_context_is_told_by_how_much(
    open_swarm: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(1)
        mesh = await swarm.mesh()
        context = mesh.model.config.context_length
        with pytest.raises(
            InferenceError, match=f"has {context + 3} tokens .* holds {context}, .* by at least 4"
        ):
            mesh.generate([5] * (context + 3))


async def test_a_generation_ends_where_the_context_does(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        context = mesh.model.config.context_length
        async with mesh.generate([5] * (context - 6), max_tokens=50) as stream:
            tokens = [token async for token in stream]
        assert len(tokens) <= 6
        assert stream.stats.finish in ("length", "end")


async def test_stats_say_what_it_took(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm(latency=0.01) as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        async with mesh.generate(PROMPT, max_tokens=12, drafter="none") as stream:
            tokens = [token async for token in stream]
        stats = stream.stats
        assert stats.tokens == len(tokens) == stats.rounds == 12
        assert (stats.tokens_per_round, stats.accepted_per_round) == (1.0, 0.0)
        assert (stats.finish, stats.drafter, stats.prompt_tokens) == ("length", "none", len(PROMPT))
        assert (stats.shards_lost, stats.numeric_classes) == (0, [swarm.shards[0].numeric_class])
        # From the prompt on, each token crosses the one link between the stages as 64 floats.
        assert stats.bytes_sent > (len(PROMPT) + 11) * 64 * 4
        async with mesh.generate([9, 8] * 40, max_tokens=30, drafter="suffix") as stream:
            accepted = len([token async for token in stream]) - stream.stats.rounds
        assert stream.stats.accepted_per_round == pytest.approx(accepted / stream.stats.rounds, abs=0.1)
        assert stream.stats.tokens_per_round > 1


async def test_a_seed_that_was_drawn_gives_the_same_tokens_again(
    open_swarm: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        async with mesh.generate(PROMPT, max_tokens=20, temperature=1.0) as stream:
            first = [token.id async for token in stream]
        again = await generate(mesh, PROMPT, max_tokens=20, temperature=1.0, seed=stream.stats.seed)
        assert again == first


async def test_text_is_encoded_as_the_tokenizer_does_and_comes_back_in_pieces(
    open_swarm: Any, generate: Any, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        async with mesh.generate("The mesh wakes", max_tokens=30) as stream:
            tokens = [token async for token in stream]
        ids = [token.id for token in tokens]
        assert ids == await generate(mesh, mesh.tokenizer.encode("The mesh wakes"), max_tokens=30)
        assert "".join(token.text for token in tokens) == mesh.tokenizer.decode(ids)


async def test_a_conversation_goes_through_the_models_template(
    open_swarm: Any, generate: Any, autojump_clock: MockClock
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    async with open_swarm() as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        async with mesh.chat(messages, max_tokens=10) as stream:
            answer = [token.id async for token in stream]
        assert answer == await generate(mesh, mesh.tokenizer.chat(messages), max_tokens=10)


async def test_a_stop_string_ends_the_text_before_itself(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        async with mesh.generate("The mesh wakes", max_tokens=40, drafter="none") as stream:
            whole = "".join([token.text async for token in stream])
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
        async with mesh.generate("The mesh wakes", max_tokens=40, stop=stop) as stream:
            cut = "".join([token.text async for token in stream])
        assert cut == whole[: whole.index(stop)]
        assert stream.stats.finish == "stop"
        assert swarm.is_idle()


async def test_logprobs_are_the_models_before_temperature(open_swarm: Any, autojump_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        async with mesh.generate(PROMPT, max_tokens=6, temperature=0.7, seed=3) as stream:
            tokens = [token async for token in stream]
        stored, layers = mesh.model, range(5)
        stage = Stage(stored.config, load_stage_tensors(stored.folder, layers), layers)
        text = [*PROMPT, *(token.id for token in tokens)]
        rows = stage.forward(torch.tensor(text), stage.new_cache(64)).log_softmax(-1)
        expected = [float(rows[at - 1, text[at]]) for at in range(len(PROMPT), len(text))]
        assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)


async def test_the_end_token_ends_the_text_and_is_not_yielded(
    open_swarm: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with open_swarm() as swarm:
        await swarm.serve(2)
        mesh = await swarm.mesh()
        async with mesh.generate(PROMPT, max_tokens=20) as stream:
            tokens = [token.id async for token in stream]
        end = next(token for token in tokens if tokens.index(token) >= 3)
        mesh.tokenizer.end_ids = frozenset([end])
        async with mesh.generate(PROMPT, max_tokens=20) as stream:
            assert [token.id async for token in stream] == tokens[: tokens.index(end)]
        assert stream.stats.finish == "end"
