from __future__ import annotations

import contextlib
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from lattica.errors import ConfigError
from lattica.ids import PeerId
from lattica.net.identity import Identity, load, load_or_create, verify


def test_the_seed_of_rfc_8032_gives_its_public_key() -> None:
    # RFC 8032 section 7.1, test 1
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert Identity(seed).peer_id == PeerId.from_public_key(public)


def test_the_peer_id_is_the_one_that_libp2p_derives() -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    seed = bytes(range(32))
    assert str(Identity(seed).peer_id) == str(ID.from_pubkey(create_new_key_pair(seed).public_key))


@given(data=st.binary(), seed=st.binary(min_size=32, max_size=32), flip=st.integers(0, 511))
def test_a_signature_holds_for_its_data_and_signer_alone(data: bytes, seed: bytes, flip: int) -> None:
    identity = Identity(seed)
    signature = identity.sign(data)
    bent = bytearray(signature)
    bent[flip // 8] ^= 1 << flip % 8
    assert verify(identity.peer_id, signature, data)
    assert not verify(identity.peer_id, signature, data + b"x")
    assert not verify(identity.peer_id, bytes(bent), data)
    assert not verify(Identity.generate().peer_id, signature, data)


def test_a_signature_of_a_hashed_peer_id_cannot_be_checked() -> None:
    assert not verify(PeerId(b"\x12\x20" + bytes(32)), bytes(64), b"")


@given(signature=st.binary(max_size=80))
def test_no_bytes_make_verify_raise(signature: bytes) -> None:
    assert not verify(PeerId.from_public_key(bytes(range(32))), signature, b"")


def test_the_same_file_gives_the_same_identity(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "key.pem"
    assert load_or_create(path) == load_or_create(path) == load(path)


def test_the_key_file_is_for_its_owner_alone_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "key.pem"
    old = os.umask(0)
    try:
        load_or_create(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["key.pem"]


def test_the_private_key_stays_out_of_the_repr() -> None:
    identity = Identity.generate()
    assert repr(identity.private_bytes) not in repr(identity)
    assert identity.private_bytes.hex() not in repr(identity)


def _ed448() -> bytes:
    return Ed448PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(10_000), _ed448()], ids=["empty", "text", "large", "ed448"]
)
def test_a_broken_key_file_is_an_error_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"key\.pem"):
        load_or_create(path)
    assert path.read_bytes() == content


@given(cut=st.integers(0, 118), noise=st.binary(max_size=20))
def test_a_damaged_key_file_gives_a_config_error_or_the_key(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("key") / "key.pem"
    load_or_create(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + noise + whole[cut + len(noise) :])
    with contextlib.suppress(ConfigError):
        load(path)


def test_a_key_file_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create(path)


def test_a_folder_in_place_of_the_key_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_or_create(tmp_path)


def test_a_file_in_place_of_the_data_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"key\.pem"):
        load_or_create(tmp_path / "file" / "key.pem")


def _peer_id_at(path: str) -> str:
    return str(load_or_create(path).peer_id)


def test_processes_that_create_the_key_at_once_agree(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_peer_id_at, [str(tmp_path / "key.pem")] * 16, chunksize=1)
    assert len(set(found)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["key.pem"]


def test_identity_does_not_import_libp2p() -> None:
    code = "import sys, lattica.net.identity; sys.exit('libp2p' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_vector_of_the_wire_page_holds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    identity = Identity(bytes([1]) * 32)
    assert str(identity.peer_id) in page
    assert identity.peer_id.multihash[2:].hex() in page
