"""Column types that mean the same on SQLite and on PostgreSQL.

PostgreSQL refuses NUL characters and lone surrogates in text and has arrays; SQLite takes any text and has
none. These types hide it: a value that is written through them reads back equal on both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def clean(value: Any) -> Any:
    """The JSON-like value with U+FFFD for every character that PostgreSQL cannot store."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def dumps(value: Any) -> str:
    """JSON text; raises ValueError for NaN and infinity, which no JSON parser here would read."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def require_json(name: str, value: Any) -> None:
    """Raise ValueError, with the name of the value, where it cannot be stored as JSON."""
    try:
        dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


class CleanText(TypeDecorator[str]):
    """Text that every back end can hold."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, _: Dialect) -> str | None:
        return None if value is None else clean(value)


class CleanJson(TypeDecorator[Any]):
    """JSON that every back end can hold: ``json`` in PostgreSQL, text in SQLite."""

    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: Any, _: Dialect) -> Any:
        return clean(value)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time, stored and given back in UTC."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(sa.DateTime(timezone=dialect.name == "postgresql"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a time zone cannot be stored")
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class _NativeArray(postgresql.ARRAY[Any]):
    """PostgreSQL's array, given as text: psycopg looks at a list item by item, most of a commit's time."""

    render_bind_cast = True  # what is sent is text, and says which array it is

    def adapt(self, _: type[Any], **__: Any) -> Any:  # type: ignore[override]  # one case of its overloads
        """Stay this class: the dialect would put its own in its place, which takes the text apart."""
        return type(self)(self.item_type)

    def bind_processor(self, _: Dialect) -> None:
        return None


class _Array(TypeDecorator[tuple[Any, ...]]):
    """A native array in PostgreSQL, JSON text in SQLite."""

    impl = sa.Text
    cache_ok = True
    item: TypeEngine[Any]

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        native = dialect.name == "postgresql"
        return dialect.type_descriptor(_NativeArray(self.item) if native else sa.Text())

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        return f"{{{self.items(value)}}}" if dialect.name == "postgresql" else self.as_text(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[Any, ...] | None:
        if value is None:
            return None
        return self.from_stored(value) if dialect.name == "postgresql" else self.from_text(value)

    def items(self, value: Sequence[Any]) -> str:
        """The items as both JSON and PostgreSQL read them, without brackets."""
        return ",".join(map(str, value))

    def as_text(self, value: Sequence[Any]) -> str:
        """What SQLite stores."""
        return f"[{self.items(value)}]"

    def from_text(self, text: str) -> tuple[Any, ...]:
        """What SQLite stored."""
        return self.from_stored(json.loads(text))

    def from_stored(self, value: list[Any]) -> tuple[Any, ...]:
        return tuple(value)


class IntArray(_Array):
    """Token ids."""

    cache_ok = True
    item = sa.Integer()


class BoolArray(_Array):
    """Flags; in SQLite a text of 0 and 1 without anything in between: they are two of five columns of a trace."""

    cache_ok = True
    item = sa.Boolean()

    def items(self, value: Sequence[Any]) -> str:
        return ",".join(self.as_text(value))

    def as_text(self, value: Sequence[Any]) -> str:
        return "".join(["1" if flag else "0" for flag in value])

    def from_text(self, text: str) -> tuple[bool, ...]:
        return tuple([flag == "1" for flag in text])


class Float32Array(_Array):
    """Numbers that are float32 already (see `float32`), written with the fewest digits that say which."""

    cache_ok = True
    item = sa.REAL()

    def items(self, value: Sequence[Any]) -> str:
        return ",".join(map(str, np.asarray(value, dtype=np.float32)))

    def from_stored(self, value: list[Any]) -> tuple[float, ...]:
        return float32(value)


def float32(values: Sequence[float]) -> tuple[float, ...]:
    """The values rounded to float32, with no negative zero; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(values, dtype=np.float64).astype(np.float32) + np.float32(0)
    return tuple(rounded.tolist())
