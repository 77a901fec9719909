"""What peers and downloaded folders tell about models: manifests, configs, safetensors headers, shard messages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from fuzzing.engine import Target
from lattica.errors import RemoteProtocolError
from lattica.ids import Cid, PeerId
from lattica.rpc import codec

# Fuzzed without torch too: none of these modules imports it.
from lattica_infer import messages
from lattica_infer.errors import WeightsError
from lattica_infer.model import files
from lattica_infer.model.config import ModelConfig
from lattica_infer.model.tensor_file import TensorSpec, canonical_header, read_tensor_table
from lattica_infer.weights.manifest import ModelManifest, Piece, SideFile, split

_VOCAB: Final = 1000
_WIDTH: Final = 4
_PEERS: Final = [PeerId.from_public_key(bytes([number]) * 32) for number in range(3)]


def _settings(random: Random) -> dict[str, Any]:
    """A config.json of a small model, of any kind that we know."""
    heads = random.choice((1, 2, 4))
    layers = random.randrange(1, 4)
    settings: dict[str, Any] = {
        "model_type": random.choice(("llama", "mistral", "qwen2", "qwen3")),
        "hidden_size": 64 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": layers,
        "intermediate_size": 128,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": random.random() < 0.5,
    }
    extra: dict[str, Any] = {
        "head_dim": 64,
        "sliding_window": random.choice((None, 512)),
        "use_sliding_window": random.random() < 0.5,
        "max_window_layers": 1,
        "attention_bias": False,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "rope_scaling": random.choice(
            (
                None,
                {"type": "linear", "factor": 2.0},
                {"rope_type": "dynamic", "factor": 4},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 1024,
                },
            )
        ),
    }
    return settings | {
        name: extra[name] for name in random.sample(sorted(extra), random.randrange(len(extra)))
    }


def _valid_config(random: Random) -> bytes:
    return json.dumps(_settings(random)).encode()


def _run_config(data: bytes) -> bool:
    """What is accepted can be worked with: its tensors counted, its angles computed."""
    try:
        config = ModelConfig.from_dict(files.parse_object(data, "config.json"))
    except WeightsError:
        return False
    assert len(config.windows) == config.num_layers
    assert config.num_heads % config.num_kv_heads == 0 == config.head_dim % 2
    if config.num_layers < 32:
        assert config.parameters > 0
    if config.head_dim <= 4096:
        angles = config.rope.inverse_frequencies(config.head_dim)
        assert angles.shape == (config.head_dim // 2,)
    return True


def _tensors(random: Random, layers: int) -> dict[str, TensorSpec]:
    dtype = random.choice(("F32", "F16", "BF16"))
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    parts = ["mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"]
    for layer in range(layers):
        count = random.randrange(1, 4)
        names += [f"model.layers.{layer}.{part}" for part in random.sample(parts, count)]
    shapes = ((8, 4), (16,), (2, 3, 4))
    return {name: TensorSpec(name, dtype, random.choice(shapes)) for name in names}


def _valid_manifest(random: Random) -> bytes:
    settings = _settings(random)
    layers = settings["num_hidden_layers"]
    pieces = [
        Piece(Cid(random.randbytes(32)), tensors) for tensors in split(_tensors(random, layers), layers)
    ]
    names = sorted(random.sample(files.SIDE_FILES, random.randrange(len(files.SIDE_FILES))))
    side_files = tuple(SideFile(name, Cid(random.randbytes(32)), random.getrandbits(20)) for name in names)
    config = json.dumps(settings).encode()
    return ModelManifest(config, side_files, pieces[0], tuple(pieces[1:-1]), pieces[-1]).to_bytes()


def _run_manifest(data: bytes) -> bool:
    """One model has one spelling, and what it claims can be added up."""
    try:
        manifest = ModelManifest.from_bytes(data)
    except WeightsError:
        return False
    assert manifest.to_bytes() == data
    assert manifest.size_bytes > 0 < manifest.parameters
    assert manifest.dtype in ("f32", "f16", "bf16")
    assert ModelManifest.from_bytes(data) == manifest
    return True


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """For one file that all inputs share; in memory where the system has such a folder. Gone with the process."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="lattica-fuzz-", dir=shared if shared.is_dir() else None)


def _valid_header(random: Random) -> bytes:
    specs = list(_tensors(random, 2).values())
    return canonical_header(specs) + bytes(sum(spec.size_bytes for spec in specs))


def _run_header(data: bytes) -> bool:
    path = Path(_folder().name) / "model.safetensors"
    path.write_bytes(data)
    try:
        tensors = read_tensor_table(path)
    except WeightsError:
        return False
    assert sum(tensor.spec.size_bytes for tensor in tensors) < len(data) or not tensors
    assert all(8 < tensor.start <= len(data) - tensor.spec.size_bytes for tensor in tensors)
    return True


# What shards say to each other: codec bytes with 2 bytes of the section's length in front, as in `rpc.py`. The
# first value of the list names the kind.


def _valid_message(random: Random) -> bytes:
    kind = random.randrange(4)
    peers = random.choice(_PEERS)
    values: list[Callable[[], Any]] = [
        lambda: _spec(random, peers).to_value(),
        lambda: _step(random, None).to_value(),
        lambda: _step(random, _WIDTH).to_value(),
        lambda: _event(random).to_value(),
    ]
    array, *section = codec.encode([kind, values[kind]()])
    joined = b"".join(section)
    return len(joined).to_bytes(2, "big") + joined + bytes(array)


def _spec(random: Random, peer: PeerId) -> messages.SessionSpec:
    hop = messages.Hop(peer, range(2, 4), ("/ip4/192.0.2.1/tcp/4001",))
    return messages.SessionSpec(
        session=random.randbytes(16),
        model=Cid(random.randbytes(32)),
        layers=range(2),
        rows=random.randrange(1, 5000),
        previous=peer,
        next=hop if random.random() < 0.5 else None,
        numeric_class=random.choice((None, "cpu-fp32-packed")),
        sampling=messages.Sampling(random.getrandbits(64), 0.5, 10, 0.9),
        epoch=random.getrandbits(20),
    )


def _step(random: Random, width: int | None) -> messages.StepFrame:
    nodes = random.randrange(1, 6)
    is_chain = random.random() < 0.5
    return messages.StepFrame(
        epoch=1,
        window=random.getrandbits(10),
        base=random.getrandbits(10),
        commit=tuple(range(random.randrange(3))),
        tokens=tuple(random.randrange(_VOCAB) for _ in range(nodes)),
        parents=tuple(
            node - 1 if is_chain else random.randrange(max(node, 1)) - (node == 0) for node in range(nodes)
        ),
        walk=random.random() < 0.5,
        hidden=None if width is None else np.ones((nodes, width), np.float32),
    )


def _event(random: Random) -> messages.Event:
    tokens = tuple(random.randrange(_VOCAB) for _ in range(random.randrange(1, 4)))
    verdict = messages.VerdictFrame(1, 2, tokens, tuple(range(1, len(tokens))), (-0.5,) * len(tokens))
    return random.choice((verdict, messages.Opened("cpu-fp32", 20.0), messages.Alive(1, 2, 3)))


def _run_message(data: bytes) -> bool:
    size = int.from_bytes(data[:2], "big")
    try:
        match codec.decode(data[2 + size :], data[2 : 2 + size]):
            case [int(kind), value]:
                message = _read(kind, value)
            case _:
                return False
    except RemoteProtocolError:
        return False
    written = codec.encode(message.to_value())
    again = _read(kind, codec.decode(bytes(written[0]), b"".join(written[1:])))
    assert b"".join(codec.encode(again.to_value())) == b"".join(written)
    return True


def _read(kind: int, value: Any) -> Any:
    match kind % 4:
        case 0:
            return messages.SessionSpec.from_value(value)
        case 1:
            return messages.StepFrame.from_value(value, vocab=_VOCAB, width=None)
        case 2:
            return messages.StepFrame.from_value(value, vocab=_VOCAB, width=_WIDTH)
        case _:
            return messages.event_from_value(value, vocab=_VOCAB)


def _valid_announcement(random: Random) -> bytes:
    addresses = tuple("/ip4/192.0.2.1/tcp/4001" for _ in range(random.randrange(4)))
    return messages.Announcement(range(3), "cpu-fp32", "f32", addresses).to_bytes()


def _run_announcement(data: bytes) -> bool:
    try:
        found = messages.Announcement.from_bytes(data)
    except RemoteProtocolError:
        return False
    assert messages.Announcement.from_bytes(found.to_bytes()) == found
    return True


def targets() -> list[Target]:
    json_memory = 160  # bytes per byte: an empty list takes 56 and a place in its parent
    return [
        Target(
            "manifest",
            "ModelManifest.from_bytes",
            _valid_manifest,
            _run_manifest,
            ("lattica_infer.weights.manifest",),
            words=(b"\xadlattica-model\x01", b"\xc4\x20", b"\xa3F32", b"tokenizer.json"),
            memory_bytes=1 << 20,
            memory_per_byte=json_memory,
        ),
        Target(
            "config",
            "config.json to a ModelConfig and its angles",
            _valid_config,
            _run_config,
            ("lattica_infer.model.config", "lattica_infer.model.rope"),
            words=(
                b"null",
                b"true",
                b"1e999",
                b"NaN",
                b"-1",
                b"0.5",
                b'"yarn"',
                b'"layer_types":["full_attention"],',
            ),
            memory_bytes=1 << 19,
            memory_per_byte=json_memory,
        ),
        Target(
            "tensor-headers",
            "read_tensor_table: the header of a safetensors file",
            _valid_header,
            _run_header,
            ("lattica_infer.model.tensor_file",),
            words=(b'"__metadata__":{},', b'"dtype":"F32"', b"[0,4]", b"-1", b"1e3", b"18446744073709551616"),
            memory_bytes=1 << 18,
            memory_per_byte=json_memory,
        ),
        Target(
            "shard-messages",
            "session specs, step frames and events from the values that the codec read",
            _valid_message,
            _run_message,
            ("lattica_infer.messages", "lattica_infer.checks"),
            words=(b"\xa6opened", b"\xa7verdict", b"\xa5alive", b"\xa7session", b"\xa3f32"),
            memory_bytes=33 << 20,
        ),
        Target(
            "announcements",
            "a shard's announcement, the value of its record",
            _valid_announcement,
            _run_announcement,
            ("lattica_infer.messages", "lattica_infer.checks"),
            words=(b"\xa6layers", b"\xadnumeric_class", b"\xa9addresses", b"\xa5dtype", b"\xd9\xff"),
            memory_bytes=1 << 19,
        ),
    ]
