"""How a lab's places are written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def kinds(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repository / "tools")
    import nat_kinds

    return nat_kinds


def test_a_place_is_a_kind_that_may_hairpin_or_beside_a_host(kinds: Any) -> None:
    hosts: dict[str, Any] = {}
    for name, text in {"a": "cone", "b": "eim+hairpin", "c": "@b", "d": "public", "e": "firewall"}.items():
        hosts[name] = kinds.parse_place(text, hosts)
    assert hosts["a"] == kinds.Place("cone")
    assert hosts["b"] == kinds.Place("eim", hairpin=True)
    assert hosts["c"] == kinds.Place("eim", hairpin=True, beside="b")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tunnel", "not one of public, cone, eim, sym, cgnat, firewall"),
        ("", "not one of"),
        ("cone+", "not one of"),
        ("cone+loop", "not one of"),
        ("public+hairpin", "only what translates"),
        ("firewall+hairpin", "only what translates"),
        ("@nobody", "no host 'nobody'"),
        ("@d", "no host 'd' behind a router"),
        ("@c", "no host 'c' behind a router of its own"),
    ],
)
def test_what_is_no_place_is_refused_with_what_there_is(kinds: Any, text: str, sentence: str) -> None:
    place = kinds.Place
    hosts = {"a": place("cone"), "c": place("cone", beside="a"), "d": place("public")}
    with pytest.raises(ValueError, match=sentence):
        kinds.parse_place(text, hosts)


def test_rules_translate_only_where_the_kind_does_and_hairpin_only_when_asked(kinds: Any) -> None:
    for kind in kinds.KINDS.values():
        plain = kinds.rules(kind.translate, "45.45.1.1", hairpin=False)
        assert ("masquerade" in plain) == bool(kind.translate)
        assert plain.count("policy drop") == 1
        assert "hairpin" not in plain
    assert "ip daddr 45.45.1.1" in kinds.rules("masquerade", "45.45.1.1", hairpin=True)
