"""A text from several fields of a record, joined by a template such as "{title}\\n\\n{body}"."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Any, cast

from flame.data.formats import Bad
from flame.data.tables import holds_text
from flame.errors import RecipeError


@dataclass(frozen=True)
class Template:
    """Literal text and fields in turn. Picklable."""

    written: str
    parts: tuple[tuple[str, tuple[str, ...]], ...]  # literal text, and the path of the field behind it

    @classmethod
    def parse(cls, written: str, source: str, setting: str = "template") -> Template:
        """`written`: as in a recipe; braces that are text are doubled. Raises RecipeError."""
        where = f'data.sources: source "{source}": {setting}'
        parts: list[tuple[str, tuple[str, ...]]] = []
        try:
            for literal, name, form, conversion in Formatter().parse(written):
                path = tuple((name or "").split("."))
                if name is not None and (form or conversion or not all(path) or set(name) & set("[]")):
                    raise RecipeError(
                        f'{where}: found a field written "{{{name}}}", expected a name alone, nested '
                        'ones with dots, such as "{title}" or "{meta.title}"'
                    )
                parts.append((literal, path if name is not None else ()))
        except ValueError as error:
            raise RecipeError(f"{where}: {error}; write braces that are text twice: {{{{ and }}}}") from None
        if not any(path for _, path in parts):
            raise RecipeError(f'{where}: names no field; expected some in braces, such as "{{title}}"')
        return cls(written, tuple(parts))

    @property
    def paths(self) -> list[tuple[str, ...]]:
        """The fields' paths, each once."""
        return list(dict.fromkeys(path for _, path in self.parts if path))

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a record that are read, whole."""
        return tuple(dict.fromkeys(path[0] for path in self.paths))

    @property
    def optional(self) -> tuple[str, ...]:
        return ()

    @property
    def taken(self) -> str:
        return "text"

    def takes(self, kind: Any) -> bool:
        """Whether a table's value of this Arrow type may be text."""
        return holds_text(kind)

    def identity(self) -> dict[str, Any]:
        """What the fingerprint holds of it."""
        return {"template": self.written}

    def text(self, record: dict[str, Any]) -> str | Bad:
        """A record's text, or why it has none."""
        texts: list[str] = []
        for literal, path in self.parts:
            texts.append(literal)
            value: Any = record
            for name in path:
                if not isinstance(value, dict) or name not in value:
                    return Bad(f'no field "{".".join(path)}"')
                value = cast("dict[str, Any]", value)[name]
            if path and not isinstance(value, str):
                return Bad(f'field "{".".join(path)}" is {"null" if value is None else "no string"}')
            texts.append(value if path else "")
        return "".join(texts) or Bad("empty text")
