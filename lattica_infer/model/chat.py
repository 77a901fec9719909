"""A model's own chat template: Jinja, sandboxed and bounded.

The template comes with the model, from whoever made it: it sees the messages and nothing else, and it can
neither loop nor write without end. Jinja has no clock to stop it by, so its loops are rewritten to draw on
a budget, and the operators that grow values are watched. Not every filter that pads or repeats is: memory can
still be spent, so trust a template about as far as the weights beside it. The names that a template may use
are those of `transformers.utils.chat_template_utils`, which the field's templates are written for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lattica_infer.errors import InferenceError, WeightsError
from lattica_infer.model import files

MAX_TEMPLATE_BYTES: Final = 256 * 1024  # Llama 4's has 5 kB
MAX_MESSAGES: Final = 4096
MAX_TEXT_CHARACTERS: Final = 4 * 1024 * 1024  # of the messages, and of what is rendered; 1M tokens of English
MAX_LOOP_STEPS: Final = 1_000_000  # of all loops of one rendering: about 0.1 s

_TOKEN_NAMES: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class TemplateRefusalError(jinja2.TemplateError):
    """The template itself called raise_exception, or went beyond a bound."""


class ChatTemplate:
    """A compiled template. `names` are the token strings that it may write, such as bos_token."""

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise WeightsError(f"the chat template is larger than {MAX_TEMPLATE_BYTES} bytes")
        self._environment = _Environment()
        self._names = dict(names)
        try:
            tree = self._environment.parse(source)
            _bound_loops(tree)
            code = self._environment.compile(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise WeightsError(
                f"the chat template is not Jinja that we can read: {error}; use the model without it (--raw)"
            ) from error
        self._template = jinja2.Template.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a model's folder; None if it has none. WeightsError if it can't be used.

        A file of its own goes before the one in tokenizer_config.json (`settings`); of several named ones the
        one called "default" is taken.
        """
        own = folder / files.CHAT_TEMPLATE
        if own.exists():
            source: Any = files.read_bounded(own, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
        else:
            source = settings.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise WeightsError(f"the chat_template of {folder} is a {type(source).__name__}, not text")
        names = {}
        for name in _TOKEN_NAMES:
            value = settings.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                names[name] = content
        return cls(source, names)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text, up to where the model's answer begins. Check the messages first.

        Raises:
            InferenceError: the template refuses the messages, fails on them or goes beyond a bound.
        """
        variables = self._names | {"messages": messages, "tools": None, "documents": None}
        steps = _steps_left.set([MAX_LOOP_STEPS])
        try:
            return self._write(variables)
        except InferenceError:
            raise
        except TemplateRefusalError as error:
            raise InferenceError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program: it may divide by zero
            raise InferenceError(
                f"the model's chat template fails on these messages: {type(error).__name__}: {error}"
            ) from error
        finally:
            _steps_left.reset(steps)

    def _write(self, variables: Mapping[str, Any]) -> str:
        written = []
        room = MAX_TEXT_CHARACTERS
        for piece in self._template.generate(variables, add_generation_prompt=True):
            room -= len(piece)
            if room < 0:
                raise TemplateRefusalError(f"it writes more than {MAX_TEXT_CHARACTERS} characters")
            written.append(piece)
        return "".join(written)


# What the loops of the rendering under way may still do, in a list of one number.
_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that templates of Hugging Face models are written for, with bounds."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters[_BOUNDED] = _draw_on_budget
        for name in _PADDING & self.filters.keys():
            del self.filters[name]
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now

    def wrap_str_format(self, value: Any) -> None:
        """No sandboxed str.format: a width in it is not bounded; `is_safe_attribute` refuses the method."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        padding = isinstance(obj, str) and attr in _PADDING
        return not padding and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        formats = operator == "%" and isinstance(left, str)  # '%999999999d' % 1
        if formats or operator == "**" or (operator == "*" and not _is_small(left, right)):
            raise TemplateRefusalError(f"it computes {operator} of values too large for a template")
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT_CHARACTERS:
            raise TemplateRefusalError(f"it builds a value longer than {MAX_TEXT_CHARACTERS}")
        return value


# Filters and methods of strings that write as many blanks as a number says.
_PADDING: Final = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}


def _is_small(left: Any, right: Any) -> bool:
    """Whether a product cannot be larger than what a template has to say."""
    size = 1
    for value in (left, right):
        if isinstance(value, int | float):
            size *= max(1, int(min(abs(value), 1e18)))
        elif isinstance(value, str | list | tuple):
            size *= max(1, len(value))
    return size <= MAX_TEXT_CHARACTERS


_BOUNDED: Final = "lattica_bounded"


def _bound_loops(tree: nodes.Template) -> None:
    """Let every `for` draw its items from the budget."""
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise WeightsError("the chat template has a recursive loop, which we cannot bound")
        loop.iter = nodes.Filter(loop.iter, _BOUNDED, [], [], None, None, lineno=loop.lineno)


def _draw_on_budget(values: Iterable[Any]) -> list[Any]:
    left = _steps_left.get()
    items = list(itertools.islice(values, left[0] + 1))
    left[0] -= len(items)
    if left[0] < 0:
        raise TemplateRefusalError(f"its loops take more than {MAX_LOOP_STEPS} steps")
    return items


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own tojson escapes for HTML."""
    if indent is not None and indent > _MAX_INDENT:
        raise TemplateRefusalError(f"it indents JSON by {indent}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_MAX_INDENT: Final = 16


def _refuse(message: object) -> NoReturn:
    raise TemplateRefusalError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InferenceError unless these are messages, no more than a model could read."""
    if len(messages) > MAX_MESSAGES:
        raise InferenceError(f"a conversation has at most {MAX_MESSAGES} messages, not {len(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InferenceError(f"message {number} is no mapping with a role and a content")
    length = sum(map(_text_length, messages))
    if length > MAX_TEXT_CHARACTERS:
        raise InferenceError(f"the messages have {length} characters; at most {MAX_TEXT_CHARACTERS} fit")


def _text_length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_text_length, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple):
        return sum(map(_text_length, value))
    return 0
