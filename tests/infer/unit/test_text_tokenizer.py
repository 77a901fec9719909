"""Tokenizer and TextStream against the `tokenizers` and `transformers` libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lattica_infer.errors import InferenceError, WeightsError
from lattica_infer.model.text import TextStream, Tokenizer

TEXTS = [
    "",
    " ",
    "The mesh wakes.",
    "  leading and trailing  \n\n",
    "naïve Ωmega 東京 😀👩‍👩‍👧 \U0001f1e9\U0001f1ea",
    "def f(x):\n\treturn x ** 2  # 12345678\r\n",
    "'s 're 've don't I'LL",
    "a" * 300,
    "\x00\x07\u200b\ufffd\u0301",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture(scope="module")
def edited(make_tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """A tiny model's folder with keys of one of its JSON files replaced (None: taken out)."""

    def edit(file: str, **changes: Any) -> Path:
        folder = make_tiny_model()
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return folder

    return edit


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_that_of_transformers(tiny_model: Path, tokenizer: Tokenizer, text: str) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    assert tokenizer.encode(text) == reference(text).input_ids


@given(st.text())
def test_decoding_gives_back_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 299)))
def test_decoding_any_ids_equals_the_library(tiny_model: Path, tokenizer: Tokenizer, ids: list[int]) -> None:
    library = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 320)))
def test_a_stream_s_pieces_join_to_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join([*map(stream.feed, ids), stream.flush()]) == tokenizer.decode(ids)


def test_a_stream_holds_back_a_character_until_it_is_whole(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.feed(token_id) for token_id in tokenizer.encode("a😀b")]
    assert pieces == ["a", "", "", "", "😀", "b"]


def test_flush_shows_an_unfinished_character_as_a_replacement(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.feed(token_id) for token_id in tokenizer.encode("😀")[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_a_stream_holds_back_no_more_than_three_bytes() -> None:
    stream = TextStream([bytes([byte]) for byte in range(256)], strip_first_space=False)
    longest_wait = 0
    for byte in [0x80, 0xF0, 0x9F, 0x98, 0x98, 0x98] * 50 + [0xF0, 0xF0, 0xF0]:
        longest_wait = longest_wait + 1 if stream.feed(byte) == "" else 0
        assert longest_wait <= 3


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, 300, 10**12, *tokenizer.encode("ok")]) == "ok"


@pytest.mark.parametrize("special", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_special_token_strings_in_text_are_plain_text(tokenizer: Tokenizer, special: str) -> None:
    ids = tokenizer.encode(f"say {special} please")
    assert not set(ids) & {0, 1, 2}
    assert tokenizer.decode(ids) == f"say {special} please"


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InferenceError, match="UTF-8"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize(("add_bos_token", "bos"), [(True, [1]), (False, []), (None, [])])
def test_a_bos_stands_first_only_if_the_configuration_says_so(
    edited: Callable[..., Path], add_bos_token: bool | None, bos: list[int]
) -> None:
    folder = edited("tokenizer_config.json", add_bos_token=add_bos_token)
    assert Tokenizer(folder).encode("The")[: len(bos) + 1] == [*bos, Tokenizer(folder).encode("The")[-1]]


def test_a_post_processor_s_bos_counts_where_add_bos_token_is_silent(edited: Callable[..., Path]) -> None:
    folder = edited("tokenizer_config.json", add_bos_token=None)
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    model.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).encode("a b") == model.encode("a b").ids
    assert Tokenizer(folder).encode("a b")[0] == 1


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([2, 0], 1, {0, 2}), (0, 1, {0}), (None, 1, {1}), (None, [1, 2], {1, 2}), (None, None, {2})],
)
def test_end_ids_come_from_generation_config_then_config_then_the_eos_token(
    edited: Callable[..., Path], generation: Any, config: Any, expected: set[int]
) -> None:
    folder = edited("generation_config.json", eos_token_id=generation)
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps(settings))
    assert Tokenizer(folder).end_ids == expected


def test_a_sentencepiece_tokenizer_decodes_bytes_and_spaces(edited: Callable[..., Path]) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {"▁The": 259, "▁mesh": 260, "s": 261}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    decoders = tokenizers.decoders
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = edited("tokenizer_config.json")
    model.save(str(folder / "tokenizer.json"))
    ids = [1, 259, 260, 261, *(3 + byte for byte in "😀é".encode()), 260, 2]
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(ids) == model.decode(ids) == "The meshs😀é mesh"
    stream = tokenizer.stream()
    assert [stream.feed(token_id) for token_id in ids[:4]] == ["", "The", " mesh", "s"]


def test_an_unknown_decoder_is_named(edited: Callable[..., Path]) -> None:
    folder = edited("tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(WeightsError, match="WordPiece"):
        Tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_tokenizer_file_is_a_weights_error(
    make_tiny_model: Callable[..., Path], content: bytes
) -> None:
    folder = make_tiny_model(layers=1)
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        Tokenizer(folder)


def test_a_missing_tokenizer_file_is_named(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(layers=1)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json does not exist"):
        Tokenizer(folder)
