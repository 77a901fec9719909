"""Settings: four layers, one sentence for each mistake."""

from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica import ConfigError, NodeConfig
from lattica.config import SETTINGS, Loaded, data_dir, load
from lattica.rpc import Limits

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
BOOTSTRAP = f"/ip4/203.0.113.10/tcp/4001/p2p/{PEER}"


def load_with(
    folder: Path, *, toml: str | None = None, environment: dict[str, str] | None = None, **arguments: object
) -> Loaded:
    """`load` with a data folder of its own and only the environment given."""
    if toml is not None:
        (folder / "config.toml").write_text(toml)
    return load({"data_dir": str(folder), **arguments}, environment=environment or {})


def test_a_bare_config_touches_no_disk() -> None:
    config = NodeConfig()
    assert config.data_dir is None
    assert config.bootstrap == ()


def test_lists_are_settled_as_tuples() -> None:
    addresses = ["/ip4/127.0.0.1/tcp/0"]
    config = NodeConfig(listen=addresses)
    addresses.append("nonsense")
    assert config.listen == ("/ip4/127.0.0.1/tcp/0",)


def test_each_layer_gives_way_to_the_next(tmp_path: Path) -> None:
    toml = 'log_level = "error"\nlog_format = "json"\nmetrics = "127.0.0.1:1"\n'
    environment = {"LATTICA_LOG_LEVEL": "warning", "LATTICA_LOG_FORMAT": "human"}
    loaded = load_with(tmp_path, toml=toml, environment=environment, log_level="debug")
    assert loaded.config.log_level == "debug"
    assert loaded.config.log_format == "human"
    assert loaded.config.metrics == "127.0.0.1:1"
    assert loaded.sources["log_level"] == "argument --log-level"
    assert loaded.sources["log_format"] == "environment LATTICA_LOG_FORMAT"
    assert loaded.sources["metrics"] == str(tmp_path / "config.toml")
    assert loaded.sources["bootstrap"] == "default"


def test_a_variable_holds_several_addresses(tmp_path: Path) -> None:
    environment = {"LATTICA_LISTEN": "/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2,/ip4/127.0.0.1/tcp/3"}
    loaded = load_with(tmp_path, environment=environment)
    assert loaded.config.listen == ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2", "/ip4/127.0.0.1/tcp/3")


@pytest.mark.parametrize(
    ("toml", "environment", "nearest"),
    [
        ('lisen = ["/ip4/0.0.0.0/tcp/1"]', {}, "listen"),
        ("", {"LATTICA_BOOTSTRAPS": "x"}, "LATTICA_BOOTSTRAP"),
    ],
)
def test_an_unknown_key_names_the_nearest(
    tmp_path: Path, toml: str, environment: dict[str, str], nearest: str
) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {nearest}\\?"):
        load_with(tmp_path, toml=toml, environment=environment)


def test_a_wrong_value_names_key_value_and_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_with(tmp_path, environment={"LATTICA_LOG_LEVEL": "loud"})
    for word in ("log_level", "'loud'", "LATTICA_LOG_LEVEL", "debug, info, warning, error"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("listen", "/ip4/0.0.0.0/tcp/1", "list"),
        ("listen", ["4001"], "looks like"),
        ("listen", ["/ip4/0.0.0.0"], "a host and a port"),
        ("listen", ["/ip4/0.0.0.0/tcp"], "'' where /tcp"),
        ("listen", ["/ip4/0.0.0.256/tcp/1"], "an IPv4 address"),
        ("listen", ["/ip4/0.0.0.0/tcp/65536"], "a port"),
        ("listen", ["/ip4/0.0.0.0/udp/1"], "no use for /udp"),
        ("listen", ["/dns/example.org/tcp/1"], "cannot be listened on"),
        ("listen", [f"/ip4/0.0.0.0/tcp/1/p2p/{PEER}"], "cannot be listened on"),
        ("listen", ["/ip4/0.0.0.0/tcp/1"] * 65, "at most 64"),
        ("announce", ["/ip4/203.0.113.1/tcp/0"], "port 0"),
        ("announce", [BOOTSTRAP], "without /p2p/"),
        ("bootstrap", ["/ip4/203.0.113.10/tcp/4001"], "must end in /p2p/ID"),
        ("bootstrap", ["/ip4/203.0.113.10/tcp/4001/p2p/12D3"], "a peer id"),
        ("bootstrap", [f"/p2p/{PEER}"], "a host and a port"),
        ("bootstrap", [f"/p2p/{PEER}/ip4/1.2.3.4/tcp/1"], "a host and a port"),
        ("bootstrap", [f"/ip4/1.2.3.4/tcp/1/p2p-circuit/p2p/{PEER}"], "through a relay"),
        ("data_dir", "", "folder"),
        ("data_dir", 7, "folder"),
        ("swarm", "join-me", "no swarms"),
        ("log_format", "xml", "human, json"),
        ("metrics", "9400", "HOST:PORT"),
        ("metrics", "localhost:9400", "IP address"),
        ("services", "yes", "true or false"),
        ("max_argument_bytes", "64 MiB", "number of bytes"),
        ("max_argument_bytes", 1000, "number of bytes from"),
        ("max_reply_bytes", 1 << 40, "number of bytes from"),
        ("max_reply_bytes", True, "number of bytes"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(key: str, value: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        NodeConfig(**{key: value})
    assert str(caught.value).startswith(f"{key} = ")
    assert "\n" not in str(caught.value)


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert NodeConfig(data_dir="~/mesh").folder == tmp_path / "mesh"


def test_a_settings_file_is_no_way_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('data_dir = "/elsewhere"')
    with pytest.raises(ConfigError, match="cannot name another folder"):
        load({}, environment={"LATTICA_DATA_DIR": str(tmp_path)})


def test_a_named_settings_file_may_name_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'data_dir = "{tmp_path / "data"}"')
    loaded = load({}, environment={}, config_file=tmp_path / "mine.toml")
    assert loaded.config.folder == tmp_path / "data"


def test_a_named_settings_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no settings file .*mine\.toml"):
        load({}, environment={"LATTICA_CONFIG": str(tmp_path / "mine.toml")})


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_settings_or_a_config_error(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(raw)
    with contextlib.suppress(ConfigError):
        assert load({}, environment={}, config_file=path).config.listen


_WORDS = st.sampled_from(
    ["ip4", "ip6", "dns", "tcp", "p2p", "p2p-circuit", "memory", "127.0.0.1", "::1", "1", PEER, ""]
)


@given(address=st.text(max_size=40) | st.lists(_WORDS, max_size=8).map(lambda words: "/" + "/".join(words)))
def test_any_text_is_an_address_or_a_config_error(address: str) -> None:
    with contextlib.suppress(ConfigError):
        assert NodeConfig(bootstrap=[address]).bootstrap == (address,)
        assert address.endswith(f"/p2p/{PEER}")


def test_sizes_of_messages_come_from_a_file_or_a_variable(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("max_argument_bytes = 2_000_000\nmax_reply_bytes = 3_000_000\n")
    config = load_with(tmp_path, environment={"LATTICA_MAX_REPLY_BYTES": "4000000"}).config
    assert (config.max_argument_bytes, config.max_reply_bytes) == (2_000_000, 4_000_000)
    with pytest.raises(ConfigError, match=r"max_reply_bytes = '4e6' from environment .*number of bytes"):
        load_with(tmp_path, environment={"LATTICA_MAX_REPLY_BYTES": "4e6"})


def test_sizes_of_messages_are_those_of_calls_by_default() -> None:
    config, limits = NodeConfig(), Limits()
    assert config.max_argument_bytes == limits.max_argument_bytes
    assert config.max_reply_bytes == limits.max_reply_bytes


_PRINTABLE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@given(folder=_PRINTABLE, level=st.sampled_from(["debug", "info", "warning", "error"]))
def test_a_printed_config_reads_back(folder: str, level: str) -> None:
    loaded = load({"data_dir": "/" + folder, "log_level": level, "bootstrap": [BOOTSTRAP]}, environment={})
    table = tomllib.loads(loaded.to_toml())
    assert NodeConfig(**table) == loaded.config


def test_a_printed_config_names_every_setting_and_its_source(tmp_path: Path) -> None:
    text = load_with(tmp_path, environment={"LATTICA_LOG_LEVEL": "debug"}).to_toml()
    assert all(any(key in line for line in text.splitlines()) for key in SETTINGS)
    assert 'log_level = "debug"  # environment LATTICA_LOG_LEVEL' in text
    assert f'data_dir = "{tmp_path}"  # argument --data' in text


def test_a_command_finds_its_folder_without_reading_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text("broken =")
    monkeypatch.setenv("LATTICA_DATA_DIR", str(tmp_path))
    assert data_dir() == tmp_path
    assert data_dir("/other") == Path("/other")
