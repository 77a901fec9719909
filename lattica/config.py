"""What a node is told: `NodeConfig`, and how it is put together from four places.

Defaults give way to a TOML file, that to `LATTICA_*` variables, those to arguments. A key that nobody knows
is an error that names the nearest known one, a value that cannot be meant is an error that names key, value
and source. `NodeConfig(...)` alone reads nothing: no file, no environment.

Knows the shape of addresses, not whether they can be listened on or dialled: that is the network's to say.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from lattica import multiaddr
from lattica.errors import ConfigError

if TYPE_CHECKING:
    from lattica.telemetry import LogFormat, LogLevel

DEFAULT_LISTEN: Final = ("/ip4/0.0.0.0/tcp/4001",)  # the port that libp2p programs use
MAX_ADDRESSES: Final = 64  # in one setting; each bootstrap peer costs a connection that is kept alive
MAX_CONFIG_FILE_BYTES: Final = 1024 * 1024  # a megabyte of settings is not a settings file

DEFAULT_MESSAGE_BYTES: Final = 64 * 1024 * 1024  # as `lattica.rpc.Limits` has it
MIN_MESSAGE_BYTES: Final = 1024 * 1024  # what the services of a node send fits: records, steps of a session
MAX_MESSAGE_BYTES: Final = 1024 * 1024 * 1024  # a message is held in memory as a whole

ENVIRONMENT_PREFIX: Final = "LATTICA_"
# Variables with our prefix that are not settings of a node.
OTHER_VARIABLES: Final = frozenset({"LATTICA_CONFIG", "LATTICA_CACHE_DIR"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Everything that a node is told. Immutable; each value is checked when it is made.

    Args:
        listen: multiaddrs to listen on, `/ip4/0.0.0.0/tcp/4001`; port 0 takes a free one. Empty: dial only.
        announce: multiaddrs to announce instead of those that we listen on, without `/p2p/`.
        bootstrap: multiaddrs of peers to stay connected to, each ending in `/p2p/ID`. Empty: a first node,
            that others dial; it keeps records for them.
        data_dir: the folder with key, lock and settings. None: the node touches no disk and gets a new key.
        swarm: a join string, which this version cannot use; None: open to whoever connects.
        log_level: "debug", "info", "warning" or "error".
        log_format: "human" or "json".
        metrics: HOST:PORT to serve Prometheus metrics at, or None.
        services: whether to start what installed packages offer under the entry point `lattica.services`.
        max_argument_bytes: what the arguments of one call may have, and an item that a caller sends: those that the
            node sends, and those that it accepts.
        max_reply_bytes: the same of one result, and of an item that a handler yields.

    Raises:
        ConfigError: a value cannot be meant.
    """

    listen: Sequence[str] = DEFAULT_LISTEN
    announce: Sequence[str] = ()
    bootstrap: Sequence[str] = ()
    data_dir: str | os.PathLike[str] | None = None
    swarm: str | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "human"
    metrics: str | None = None
    services: bool = False
    max_argument_bytes: int = DEFAULT_MESSAGE_BYTES
    max_reply_bytes: int = DEFAULT_MESSAGE_BYTES

    def __post_init__(self) -> None:
        for key, check in _CHECKS.items():
            value = getattr(self, key)
            try:
                object.__setattr__(self, key, check(value))
            except ValueError as error:
                raise ConfigError(f"{key} = {_shown(value)}: {error}") from None

    @property
    def folder(self) -> Path | None:
        """`data_dir` as a path."""
        return None if self.data_dir is None else Path(self.data_dir)


def default_data_dir() -> Path:
    """The folder of the node that commands mean when none is named: `~/.local/share/lattica` on Linux."""
    import platformdirs

    return Path(platformdirs.user_data_dir("lattica"))


# Checks: each takes any value, gives the settled one, and raises ValueError with the rest of a sentence.


def _addresses(value: object, check: Callable[[dict[str, str], str], None]) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError("expected a list of multiaddrs")
    if len(value) > MAX_ADDRESSES:
        raise ValueError(f"at most {MAX_ADDRESSES} addresses, not {len(value)}")
    for address in value:
        check(multiaddr.parts(address), address)
    return tuple(value)


def _listen(value: object) -> tuple[str, ...]:
    def check(parts: dict[str, str], address: str) -> None:
        if "p2p" in parts or not parts.keys() & {"ip4", "ip6", "memory"}:
            raise ValueError(f"{address} cannot be listened on; expected /ip4/HOST/tcp/PORT")

    return _addresses(value, check)


def _announce(value: object) -> tuple[str, ...]:
    def check(parts: dict[str, str], address: str) -> None:
        if "p2p" in parts:
            raise ValueError(f"{address} must stand without /p2p/, which the node adds")
        if parts.get("tcp") == "0":
            raise ValueError(f"{address} cannot be dialled: port 0 means any port")

    return _addresses(value, check)


def _bootstrap(value: object) -> tuple[str, ...]:
    def check(parts: dict[str, str], address: str) -> None:
        if "p2p" not in parts:
            raise ValueError(f"{address} must end in /p2p/ID; `lattica node status` shows whole addresses")

    return _addresses(value, check)


def _data_dir(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "\0" in str(os.fspath(value)):
        raise ValueError("expected a folder's path")
    # Absolute at once: a later chdir must not move the node's folder.
    return os.path.abspath(os.path.expanduser(str(os.fspath(value))))


def _swarm(value: object) -> None:
    if value is not None:
        raise ValueError("this version has no swarms; leave it out, and whoever connects is in")


def _choice(*choices: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value

    return check


def _metrics(value: object) -> str | None:
    if value is None:
        return None
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    try:
        multiaddr.check_port(port)
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise ValueError("expected HOST:PORT with an IP address, such as 127.0.0.1:9400") from None
    return f"{host}{colon}{port}"


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _message_bytes(value: object) -> int:
    if type(value) is not int or not MIN_MESSAGE_BYTES <= value <= MAX_MESSAGE_BYTES:
        raise ValueError(f"expected a number of bytes from {MIN_MESSAGE_BYTES} to {MAX_MESSAGE_BYTES}")
    return value


_CHECKS: Mapping[str, Callable[[object], object]] = {
    "listen": _listen,
    "announce": _announce,
    "bootstrap": _bootstrap,
    "data_dir": _data_dir,
    "swarm": _swarm,
    "log_level": _choice("debug", "info", "warning", "error"),
    "log_format": _choice("human", "json"),
    "metrics": _metrics,
    "services": _flag,
    "max_argument_bytes": _message_bytes,
    "max_reply_bytes": _message_bytes,
}
assert _CHECKS.keys() == {field.name for field in fields(NodeConfig)}


def _shown(value: object) -> str:
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


# Layers.

# What a user may write in a file or a variable. `swarm` is no setting until there are swarms.
SETTINGS: Final = tuple(key for key in _CHECKS if key != "swarm")
_LISTS = frozenset({"listen", "announce", "bootstrap"})
_NUMBERS = frozenset({"max_argument_bytes", "max_reply_bytes"})


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and where each value came from."""

    config: NodeConfig
    sources: Mapping[str, str]

    def to_toml(self) -> str:
        """The effective settings as a TOML file, each with its source as a comment."""
        lines = []
        for key in SETTINGS:
            value = getattr(self.config, key)
            text = f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"
            lines.append(f"{text}  # {self.sources[key]}\n")
        return "".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def load(
    arguments: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    config_file: str | os.PathLike[str] | None = None,
) -> Loaded:
    """Put a configuration together: defaults < TOML file < environment < arguments.

    Args:
        arguments: values from the command line; None means "not given".
        environment: `LATTICA_*` variables, by default the process's. Lists are separated by commas.
        config_file: by default `LATTICA_CONFIG`, else `config.toml` in the data folder where there is one.

    Raises:
        ConfigError: an unknown key, a value that cannot be meant, or a file that cannot be read.
    """
    environment = os.environ if environment is None else environment
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    _refuse_unknown(given, SETTINGS, "an argument")
    variables = _from_environment(environment)

    values: dict[str, object] = {"data_dir": str(default_data_dir()), "services": True}
    sources = dict.fromkeys(SETTINGS, "default")

    def settle(layer: Mapping[str, object], source: Callable[[str], str]) -> None:
        for key, value in layer.items():
            try:
                values[key] = _CHECKS[key](value)
            except ValueError as error:
                raise ConfigError(f"{key} = {_shown(value)} from {source(key)}: {error}") from None
            sources[key] = source(key)

    named = config_file or environment.get("LATTICA_CONFIG")
    path = Path(named).expanduser() if named else _folder_of(given, variables, values) / "config.toml"
    if (table := _read_toml(path, required=bool(named))) is not None:
        _refuse_unknown(table, SETTINGS, str(path))
        settle(table, lambda key: str(path))
        if not named and "data_dir" in table and values["data_dir"] != str(path.parent):
            raise ConfigError(
                f"data_dir = {table['data_dir']!r} from {path}: it cannot name another folder;"
                " use --data or LATTICA_DATA_DIR"
            )
    settle(variables, lambda key: f"environment {ENVIRONMENT_PREFIX}{key.upper()}")
    settle(given, lambda key: f"argument --{_OPTIONS.get(key, key.replace('_', '-'))}")
    return Loaded(NodeConfig(**cast("dict[str, Any]", values)), sources)


_OPTIONS = {"data_dir": "data"}


def data_dir(argument: str | os.PathLike[str] | None = None) -> Path:
    """The data folder that a command means: `--data`, else LATTICA_DATA_DIR, else the default.

    Unlike `load` it reads no file: a command that asks a running node needs to know nothing else.
    """
    variables = {k: v for k, v in _from_environment(os.environ).items() if k == "data_dir"}
    given = {} if argument is None else {"data_dir": argument}
    return _folder_of(given, variables, {"data_dir": str(default_data_dir())})


def _folder_of(*layers: Mapping[str, object]) -> Path:
    value = next(layer["data_dir"] for layer in layers if "data_dir" in layer)
    try:
        folder = _data_dir(value)
    except ValueError as error:
        raise ConfigError(f"data_dir = {_shown(value)}: {error}") from None
    assert folder is not None
    return Path(folder)


def _from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    names = {f"{ENVIRONMENT_PREFIX}{key.upper()}": key for key in SETTINGS}
    ours = [name for name in environment if name.startswith(ENVIRONMENT_PREFIX)]
    _refuse_unknown(
        [name for name in ours if name not in OTHER_VARIABLES], (*names, *OTHER_VARIABLES), "the environment"
    )
    return {key: _read_variable(key, environment[name]) for name, key in names.items() if name in environment}


def _read_variable(key: str, text: str) -> object:
    """The value that a variable's text stands for; texts that stand for none go on to the key's check."""
    if key in _LISTS:
        return tuple(text.replace(",", " ").split())
    if key == "services":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if key in _NUMBERS and text.isascii() and text.isdigit():
        return int(text) if len(text) < 20 else text
    return text or None if key == "metrics" else text


def _read_toml(path: Path, *, required: bool) -> dict[str, Any] | None:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_CONFIG_FILE_BYTES + 1)
        if len(raw) > MAX_CONFIG_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_CONFIG_FILE_BYTES} bytes: not a settings file")
        return tomllib.loads(raw.decode())
    except (FileNotFoundError, NotADirectoryError):
        if required:
            raise ConfigError(f"no settings file {path}; leave out --config to use the defaults") from None
        return None
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None


def _refuse_unknown(keys: object, known: Sequence[str], source: str) -> None:
    for key in cast("Sequence[str]", keys):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown setting {key!r} in {source}; {hint}")
