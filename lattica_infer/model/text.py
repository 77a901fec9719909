"""Text to token ids and back, as the model's own folder says.

Two families of tokenizers are known, by how ids become bytes: byte-level BPE (GPT-2's alphabet) and
SentencePiece's with byte fallback. Encoding is the `tokenizers` library's. Decoding is a table from id to
bytes and UTF-8 over it, so that text can be streamed a token at a time at constant cost, and the pieces join
to what `decode` gives at once; the library's own `DecodeStream` decodes a window again for each token, and
that window grows as long as bytes are not UTF-8. No torch here: a coordinator without weights uses it, too.
"""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken

from lattica_infer.errors import InferenceError, WeightsError
from lattica_infer.model import files
from lattica_infer.model.chat import ChatTemplate, check_messages

# Plane 15: private use, so that no filter of a template takes one for a blank, a letter or a digit.
_PRIVATE: Final = tuple(map(chr, range(0xF0000, 0xFFFFE)))


class Tokenizer:
    """The tokenizer of the model in `folder`: tokenizer.json, tokenizer_config.json and the chat template.

    Special tokens (those that tokenizer.json marks so) can't be written by a user: in `encode` and in
    messages their strings are plain text. Only the chat template's own text makes them.

    Raises:
        WeightsError: a file is missing, damaged, or of a tokenizer kind that we don't decode.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        source = files.read_bounded(self.folder / files.TOKENIZER, files.MAX_TOKENIZER_BYTES)
        description = files.parse_object(source, str(self.folder / files.TOKENIZER))
        settings = files.read_optional_object(self.folder / files.TOKENIZER_CONFIG)
        try:
            self._model = tokenizers.Tokenizer.from_buffer(source)
        except Exception as error:  # the library raises bare Exception
            raise WeightsError(
                f"{self.folder / files.TOKENIZER} is no tokenizer that we can read: {error}"
            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # their strings are plain text
        added = self._model.get_added_tokens_decoder()
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        self._bytes_of, self._strip_first_space = _byte_table(self._model, description, added)
        self._prefix = self._leading_ids(settings)
        self._template = ChatTemplate.load(self.folder, settings)
        self.end_ids = self._find_end_ids(settings)

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; a model's logits may be padded beyond it."""
        return len(self._bytes_of)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; a BOS goes before it only if the tokenizer's configuration adds one."""
        return self._prefix + _encode(self._model, text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Special tokens and ids beyond the vocabulary have none; bytes that are not
        UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.feed, ids), stream.flush()])

    def stream(self) -> TextStream:
        """Decode one token at a time."""
        return TextStream(self._bytes_of, strip_first_space=self._strip_first_space)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation, up to where the model's answer begins, by the model's chat template.

        Strings of special tokens inside messages stay plain text: while the template runs, one private-use
        character stands for each. So a template that looks for such a string in a message, or counts
        characters, finds something else there. A special token that the end of a message and the template's
        own text make together is not noticed; no template that we know has text that would complete one.

        Raises:
            InferenceError: there is no template, or it refuses these messages (the error quotes it).
        """
        if self._template is None:
            raise InferenceError(
                f"{self.folder.name} has no chat template; give the prompt as plain text (--raw)"
            )
        check_messages(messages)
        hidden, written = self._stand_ins.hide(messages)
        return self._stand_ins.encode(self._template.render(hidden), written)

    @cached_property
    def _stand_ins(self) -> _StandIns:
        return _StandIns(self._model)  # a second copy of the model's tokenizer: only for who chats

    def _leading_ids(self, settings: Mapping[str, Any]) -> list[int]:
        """What stands before every text: add_bos_token decides; where it is silent, the post-processor."""
        wanted = settings.get("add_bos_token")
        bos = self._special.get(_token_text(settings.get("bos_token")) or "")
        if wanted is None:
            processed = self._model.encode("", add_special_tokens=True).ids
            return processed[:1] if bos is not None and processed[:1] == [bos] else []
        if wanted and bos is None:
            raise WeightsError(
                f"{self.folder / files.TOKENIZER_CONFIG} says add_bos_token, but its bos_token "
                f"{settings.get('bos_token')!r} is no special token"
            )
        return [bos] if wanted and bos is not None else []

    def _find_end_ids(self, settings: Mapping[str, Any]) -> frozenset[int]:
        generation = files.read_optional_object(self.folder / files.GENERATION_CONFIG)
        config = files.read_optional_object(self.folder / files.CONFIG)
        for name, source in ((files.GENERATION_CONFIG, generation), (files.CONFIG, config)):
            value = source.get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
                raise WeightsError(
                    f"{self.folder / name} has eos_token_id {str(value)[:80]}, "
                    "which is neither a token id nor a list of them"
                )
            return frozenset(ids)
        end = self._special.get(_token_text(settings.get("eos_token")) or "")
        return frozenset() if end is None else frozenset([end])


class TextStream:
    """Text of a token stream, as far as it is whole: `feed` each id, `flush` at the end.

    What the pieces join to is what `Tokenizer.decode` gives. At most three bytes are held back.
    """

    def __init__(self, bytes_of: Sequence[bytes], *, strip_first_space: bool) -> None:
        self._bytes_of = bytes_of
        self._at_start = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        known = 0 <= token_id < len(self._bytes_of)
        token = self._bytes_of[token_id] if known else b""
        if token and self._at_start:  # SentencePiece writes a space before the first word
            token = token.removeprefix(b" ")
            self._at_start = False
        return self._decoder.decode(token)

    def flush(self) -> str:
        """What is held back, as U+FFFD; the stream is as new afterwards, but for the leading space."""
        return self._decoder.decode(b"", final=True)


class _StandIns:
    """Encodes templated text in which special tokens count, and those that a user wrote don't.

    The model's special tokens are known to the library under a second, unguessable name each. The library
    is told to read the first names as plain text; the template's own are swapped for second names, the user's
    are not. So the library still does all the splitting, with each token's own whitespace flags.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        added = model.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added.items() if token.special}
        nonce = secrets.token_hex(16)
        self._model = tokenizers.Tokenizer.from_str(model.to_str())
        self._model.encode_special_tokens = True
        self._second = {token.content: f"\ue000{nonce}.{i}\ue000" for i, token in special.items()}
        self._model.add_tokens(
            [
                AddedToken(
                    self._second[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=False,
                )
                for token in special.values()
            ]
        )
        self._id_of = {self._model.token_to_id(self._second[t.content]): i for i, t in special.items()}
        self._any_special = _alternation(self._second)

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], dict[str, str]]:
        """The messages with one private-use character for each special token, and what those stand for.

        One character, so that no template can cut it; one that the messages don't use themselves.
        """
        used = {character for text in _strings(messages) for character in text if character >= _PRIVATE[0]}
        free = (character for character in _PRIVATE if character not in used)
        hidden = dict(zip(self._second, free, strict=False))
        if len(hidden) < len(self._second):
            raise InferenceError("the messages use too many private-use characters; remove some")
        replaced = _replace(
            messages, lambda text: self._any_special.sub(lambda match: hidden[match[0]], text)
        )
        return replaced, {character: content for content, character in hidden.items()}

    def encode(self, text: str, written: Mapping[str, str]) -> list[int]:
        """The ids of what a template made of hidden messages; `written` as `hide` gave it."""
        text = self._any_special.sub(lambda match: self._second[match[0]], text)
        text = text.translate({ord(character): content for character, content in written.items()})
        return [self._id_of.get(token_id, token_id) for token_id in _encode(self._model, text)]


def _encode(model: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return model.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate is no text
        raise InferenceError("the text holds characters that UTF-8 cannot write; remove them") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _replace(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_replace(key, change): _replace(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item, change) for item in value]
    return value


def _alternation(words: Iterable[str]) -> re.Pattern[str]:
    """Any of some strings, the longest where several begin; without any, what never matches."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json writes a token as a string or as an AddedToken's fields."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _byte_table(
    model: tokenizers.Tokenizer, description: Mapping[str, Any], added: Mapping[int, AddedToken]
) -> tuple[list[bytes], bool]:
    """The bytes of every id, and whether a text's first space is dropped. Raises WeightsError."""
    steps = _decoder_steps(description.get("decoder"))
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        to_bytes, strip = _byte_level_bytes, False
    elif "ByteFallback" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        to_bytes, strip = _byte_fallback_bytes, bool(kinds & {"Strip", "Metaspace"})
    else:
        names = ", ".join(sorted(map(str, kinds))) or "none"
        raise WeightsError(
            f"the tokenizer decodes by {names[:80]}; "
            "supported are ByteLevel and SentencePiece with ByteFallback"
        )
    vocabulary = model.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        table[token_id] = to_bytes(token)
    for token_id, entry in added.items():
        table[token_id] = b"" if entry.special else to_bytes(entry.content)
    return table, strip


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    nested = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return [step for step in nested or [] if isinstance(step, dict)]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (bytes_to_unicode in its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token stands for its own text
        return token.encode()


def _byte_fallback_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()
