"""What the demo tells at its end: one JSON object, or the same as two small tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHORT_PEER_ID = 12  # letters of a peer id that tell the five apart; the JSON has them whole


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: its token ids, its text, and the coordinator's statistics."""

    tokens: list[int]
    text: str
    stats: Mapping[str, Any]

    def json(self) -> dict[str, Any]:
        """`tokens` are the ids; the statistics' own count of them goes by `count`."""
        rest = {key: value for key, value in self.stats.items() if key != "tokens"}
        return {"tokens": self.tokens, "text": self.text, "count": len(self.tokens), **rest}


@dataclass(frozen=True, slots=True)
class PeerRow:
    """One process of the demo as the coordinator sees it; `path` and `rtt_ms` are None for itself."""

    peer_id: str
    role: str
    layers: tuple[int, int] | None = None
    path: str | None = None
    rtt_ms: float | None = None

    def json(self) -> dict[str, Any]:
        """As `lattica demo --json` prints it; `layers` as in Python, `[first, end]`."""
        return {
            "peer_id": self.peer_id,
            "role": self.role,
            "layers": list(self.layers) if self.layers else None,
            "path": self.path,
            "rtt_ms": self.rtt_ms,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """A whole demo."""

    model: str
    prompt: str
    plain: Run
    speculative: Run
    peers: Sequence[PeerRow]
    link_ms: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether both runs gave the same tokens: compared here, never assumed."""
        return self.plain.tokens == self.speculative.tokens

    @property
    def speedup(self) -> float | None:
        """Speculative over plain, in tokens per second; None where a run was too short to have a speed."""
        plain, speculative = (run.stats.get("tokens_per_second") for run in (self.plain, self.speculative))
        return speculative / plain if plain and speculative else None

    def json(self) -> dict[str, Any]:
        """What `lattica demo --json` prints, the settings beside it."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "plain": self.plain.json(),
            "speculative": self.speculative.json(),
            "identical": self.identical,
            "speedup": self.speedup,
            "peers": [peer.json() for peer in self.peers],
            "link_ms": self.link_ms,
            **self.settings,
        }

    def tables(self) -> RenderableType:
        """The same for a person."""
        return Group(_peers_table(self.peers), Text(), _runs_table(self), Text(), self._verdict())

    def _verdict(self) -> Text:
        if not self.identical:
            return Text("different: the two outputs are not the same tokens", style="bold red")
        faster = f", {self.speedup:.2f} times as fast" if self.speedup else ""
        return Text(f"identical: {len(self.plain.tokens)} tokens in both runs{faster}", style="bold green")


def _peers_table(peers: Sequence[PeerRow]) -> Table:
    table = Table(
        "peer", "role", "layers", "path", "round trip", box=None, header_style="bold", pad_edge=False
    )
    for peer in peers:
        layers = f"{peer.layers[0]}:{peer.layers[1]}" if peer.layers else ""
        round_trip = f"{peer.rtt_ms:.1f} ms" if peer.rtt_ms is not None else ""
        short = "…" + peer.peer_id[-_SHORT_PEER_ID:]  # all Ed25519 ids begin with the same letters
        table.add_row(short, peer.role, layers, peer.path or "", round_trip)
    return table


def _runs_table(report: Report) -> Table:
    table = Table("", "plain", "speculative", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, key, form in (
        ("tokens", "tokens", "d"),
        ("tokens/s", "tokens_per_second", ".1f"),
        ("rounds", "rounds", "d"),
        ("tokens a round", "tokens_per_round", ".2f"),
        ("first token after", "time_to_first_token_seconds", ".2f"),
        ("bytes sent", "bytes_sent", ",d"),
    ):
        cells = [_cell(run.stats.get(key), form) for run in (report.plain, report.speculative)]
        table.add_row(label, *(f"{cell} s" if "first" in label and cell else cell for cell in cells))
    return table


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
