"""Chat templates: Jinja in a sandbox, with what transformers gives to a template and nothing else."""

from __future__ import annotations

import json
from datetime import date
from functools import lru_cache
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Noncharacters of Unicode, which no text may interchange: they mark places in what a template writes.
TAINT = "\ufdd0"  # inside what spells a special token in a message
BEGIN, END = "\ufdd1", "\ufdd2"  # around what a template calls the model's own words
MARKS = TAINT + BEGIN + END
CLOCK = "strftime_now"


class Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: marks what is between them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


class Dictionaries:
    """`dict` as a template may use it: no attribute leads out of the sandbox."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str) -> None:
    """What a template calls where it cannot render a conversation."""
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=16)
def compiled(template: str, today: date | None) -> jinja2.Template:
    """`today`: what the clock says. Raises jinja2.TemplateSyntaxError."""
    environment = _environment()
    if today is not None:
        cast("Any", environment.globals)[CLOCK] = today.strftime
    return environment.from_string(template)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    cast("Any", environment.globals).update(raise_exception=refuse, dict=Dictionaries())
    return environment


@lru_cache(maxsize=16)
def reads_clock(template: str) -> bool:
    """Whether what a template writes may depend on the day."""
    environment = _environment()
    return CLOCK in jinja2.meta.find_undeclared_variables(environment.parse(template))


@lru_cache(maxsize=16)
def marks_generation(template: str) -> bool:
    """Whether a template says itself which words are the model's."""
    calls = _environment().parse(template).find_all(jinja2.nodes.ExtensionAttribute)
    return any(call.name == "_mark" for call in calls)
