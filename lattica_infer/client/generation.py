"""One generation: what was asked, the tokens as they come, what it took."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import trio

from lattica.errors import LatticaError, RemoteProtocolError
from lattica_infer.client.pipeline import Pipeline
from lattica_infer.client.stops import StopScanner
from lattica_infer.errors import InferenceError, ShardLostError
from lattica_infer.messages import Sampling, StepFrame, VerdictFrame
from lattica_infer.model.text import Tokenizer
from lattica_infer.spec.budget import Budget
from lattica_infer.spec.decode import Decoder, Emitted, Round
from lattica_infer.spec.drafters import DRAFTERS, Drafter, make_drafter
from lattica_infer.spec.verify import Verdict

PREFILL_CHUNK: Final = (
    128  # prompt tokens a frame: the stages work on several at once, and a pass stays short
)
MAX_DRAFT_NODES: Final = 64  # of one round; a pass over so many costs five of one token (LOG.md)
_TOKEN_BUFFER: Final = 256  # tokens that the program has not read yet; then the generation waits for it
_SEED_BITS: Final = 53  # of a seed drawn here: exact in every JSON reader's numbers


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. `text` is what it completes: "" while a character is not whole.

    `logprob` is natural, before temperature and warping.
    """

    id: int
    text: str
    logprob: float


@dataclass(slots=True)
class GenerationStats:
    """What a generation took; final once the tokens have ended.

    `tokens_per_second` counts from the first token to the last; None before there are two.
    `accepted_per_round` counts draft tokens, without the bonus one. `bytes_sent` is the payload over all
    links.
    `numeric_classes` has more than one entry where the route mixed them: then the seed's promise is off.
    """

    seed: int
    drafter: str
    prompt_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    tokens_per_round: float = 0.0
    accepted_per_round: float = 0.0
    time_to_first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    bytes_sent: int = 0
    shards_lost: int = 0
    finish: Literal["end", "length", "stop"] | None = None
    numeric_classes: list[str] = field(default_factory=list)

    def to_value(self) -> dict[str, Any]:
        """As plain values, for JSON and for the control socket."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Request:
    """A generation as asked for, checked."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    drafter: Drafter

    @property
    def rows(self) -> int:
        """Cache rows that every stage has to grant."""
        return len(self.prompt) + self.max_tokens + MAX_DRAFT_NODES + 1


def make_request(
    prompt: str | Sequence[int],
    *,
    tokenizer: Tokenizer,
    model: str,
    vocab: int,
    context: int,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    top_k: int,
    top_p: float,
    stop: str | Sequence[str],
    drafter: str | Drafter,
    relaxed: float,
    audit: float,
) -> Request:
    """Check what a program asks for; `max_tokens` is cut to what the context holds.

    Raises:
        InferenceError: one sentence that names the value and its range.
    """
    for name, value in (("relaxed", relaxed), ("audit", audit)):
        if value != 0.0:
            raise InferenceError(f"{name}={value} is not available in this version: leave it 0.0")
    ids = tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) else _token_ids(prompt, vocab)
    if not ids:
        raise InferenceError("the prompt is empty: give at least one token")
    if len(ids) >= context:
        raise InferenceError(
            f"the prompt has {len(ids)} tokens and the context of {model} holds {context}, output included: "
            f"shorten it by at least {len(ids) - context + 1} tokens"
        )
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise InferenceError(f"max_tokens is {max_tokens!r}: take 1 or more")
    for name, number in (("seed", seed), ("top_k", top_k)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise InferenceError(f"{name} is {number!r}: take a whole number")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InferenceError(f"{name} is {value!r}: take a number")
    sampling = Sampling(secrets.randbits(_SEED_BITS) if seed is None else seed, temperature, top_k, top_p)
    try:
        sampling.check()
    except ValueError as error:
        raise InferenceError(str(error)) from error
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) for text in stops):
        raise InferenceError(f"stop takes strings, not {list(stops)!r:.80}")
    StopScanner[Emitted](stops)  # raises for what it cannot take
    return Request(ids, min(max_tokens, context - len(ids)), sampling, stops, _drafter(drafter))


def _token_ids(prompt: Sequence[int], vocab: int) -> tuple[int, ...]:
    try:
        ids = tuple(operator.index(token) for token in prompt)
    except TypeError as error:
        raise InferenceError(f"a prompt is text or a list of token ids: {error}") from error
    for place, token in enumerate(ids):
        if not 0 <= token < vocab:
            raise InferenceError(f"token {place} of the prompt is {token}: ids are 0 to {vocab - 1}")
    return ids


def _drafter(drafter: str | Drafter) -> Drafter:
    if not isinstance(drafter, str):
        return drafter
    try:
        return make_drafter(drafter)
    except ValueError:
        known = ", ".join(DRAFTERS)
        raise InferenceError(f"no drafter is named {drafter!r}: known are {known}") from None


class GenerationStream:
    """Tokens as they come: `async for token in stream`. An error comes after the tokens before it."""

    def __init__(self, stats: GenerationStats) -> None:
        self.stats = stats
        self._error: LatticaError | None = None
        self._tell, self._tokens = trio.open_memory_channel[Token](_TOKEN_BUFFER)

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> Token:
        try:
            return await self._tokens.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                raise self._error from None
            raise StopAsyncIteration from None

    async def put(self, token: Token) -> None:
        """Give out a token; waits while many have not been read."""
        await self._tell.send(token)

    def end(self, error: LatticaError | None = None) -> None:
        """No more tokens come; `error` says why, unless all is well."""
        self._error = error
        self._tell.close()


class Generation:
    """Drives a decoder over an open pipeline and gives out its tokens."""

    def __init__(
        self, request: Request, stream: GenerationStream, *, tokenizer: Tokenizer, vocab: int, started: float
    ) -> None:
        self._request = request
        self._stream = stream
        self._stats = stream.stats
        self._vocab = vocab
        self._end_ids = tokenizer.end_ids
        self._text = tokenizer.stream()
        self._stops: StopScanner[Emitted] = StopScanner(request.stop)
        self._started = started
        self._first = 0.0

    async def run(self, pipeline: Pipeline) -> None:
        """Generate to the end. Raises what the pipeline raises, after the tokens before it."""
        request = self._request
        self._stats.numeric_classes = sorted({stage.numeric_class for stage in pipeline.stages})
        budget = Budget(
            round_trip_seconds=sum(stage.cost_seconds for stage in pipeline.stages), max_nodes=MAX_DRAFT_NODES
        )
        decoder = Decoder(
            request.prompt,
            drafter=request.drafter,
            budget=budget,
            max_tokens=request.max_tokens,
            end_ids=self._end_ids,
            rows=request.rows,
            vocabulary=self._vocab,
            chunk=PREFILL_CHUNK,
        )
        try:
            behind_prefill = False
            for frame in decoder.prefill():
                await pipeline.send(_frame(frame))
                behind_prefill = True
            while not self._stops.stopped and (asked := decoder.next_round()) is not None:
                sent = trio.current_time()
                await pipeline.send(_frame(asked))
                verdict = await pipeline.verdict()
                seconds = trio.current_time() - sent
                if behind_prefill:  # the prompt's own passes are in it, and would teach the budget a lie
                    usual = budget.fixed_seconds + (len(asked.tokens) - 1) * budget.node_seconds
                    seconds, behind_prefill = min(seconds, usual), False
                emitted = self._accept(decoder, asked, verdict, seconds, pipeline)
                self._stats.rounds = decoder.stats.rounds
                self._stats.accepted_per_round = decoder.stats.accepted_per_round
                await self._give(emitted, ended=decoder.finish is not None)
        except ShardLostError:
            self._stats.shards_lost += 1
            raise
        finally:
            self._stats.bytes_sent = pipeline.bytes_sent
        self._stats.finish = "stop" if self._stops.stopped else decoder.finish

    def _accept(
        self, decoder: Decoder, asked: Round, verdict: VerdictFrame, seconds: float, pipeline: Pipeline
    ) -> list[Emitted]:
        tail = pipeline.stages[-1].peer
        if (verdict.epoch, verdict.window) != (asked.epoch, asked.window):
            raise RemoteProtocolError(
                f"a verdict on frame {verdict.window} of epoch {verdict.epoch}, "
                f"where {asked.window} of epoch {asked.epoch} was asked for",
                peer=tail,
            )
        try:
            return decoder.on_verdict(
                Verdict(list(verdict.tokens), list(verdict.path), list(verdict.logprobs)), seconds=seconds
            )
        except RemoteProtocolError as error:
            error.peer = tail
            raise

    async def _give(self, emitted: Sequence[Emitted], *, ended: bool) -> None:
        """Give out what a verdict brought, as far as no stop string holds it back."""
        for index, token in enumerate(emitted):
            text = self._text.feed(token.id)
            if ended and index == len(emitted) - 1:
                text += self._text.flush()
            for held, whole in self._stops.feed(token, text):
                await self._put(held, whole)
            if self._stops.stopped:
                return
        if ended:
            for held, whole in self._stops.flush():
                await self._put(held, whole)

    async def _put(self, token: Emitted, text: str) -> None:
        stats, now = self._stats, trio.current_time()
        stats.tokens += 1
        stats.tokens_per_round = stats.tokens / stats.rounds
        if stats.tokens == 1:
            self._first = now
            stats.time_to_first_token_seconds = now - self._started
        elif now > self._first:
            stats.tokens_per_second = (stats.tokens - 1) / (now - self._first)
        await self._stream.put(Token(token.id, text, token.logprob if token.logprob is not None else 0.0))


def _frame(asked: Round) -> StepFrame:
    return StepFrame(
        epoch=asked.epoch,
        window=asked.window,
        base=asked.base,
        commit=asked.commit,
        tokens=asked.tokens,
        parents=asked.parents,
        walk=asked.want == "walk",
    )
