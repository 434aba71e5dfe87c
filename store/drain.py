"""What was drained from the runtime, into the metrics file: once, however often it is drained."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import JSON, func
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session

from store.tables import DrainCursor, MetricsBase, RequestTiming, RuntimeEvent, Step, table_of

log = logging.getLogger(__name__)

Record = Mapping[str, Any]


class Drained(NamedTuple):
    """Records read from one answer, by kind; `num_bad` could not be understood and are not stored."""

    num_requests: int
    num_steps: int
    num_events: int
    num_bad: int


class _Bad(Exception):
    """A record that no later attempt would make storable."""


def save_drained(
    session: Session, boot_id: str, records: Iterable[Record], next_seq: int, dropped: int, now: float
) -> Drained:
    """Adds the rows of one answer of `/control/drain` and moves its cursor, in the transaction of `session`.

    A record that stands already is left as it is, so the same answer may come again. Once the session has
    committed, `next_seq` may be acknowledged. A record that lacks a part is counted and passed over: it
    would otherwise be drained for ever.
    """
    rows: dict[type[MetricsBase], list[dict[str, Any]]] = {RequestTiming: [], Step: [], RuntimeEvent: []}
    num_bad = 0
    for record in records:
        try:
            noun, row = _row(boot_id, record)
        except _Bad as error:
            num_bad += 1
            log.warning("boot %s, record %s passed over: %s", boot_id, record.get("seq"), error)
        else:
            rows[noun].append(row)
    for table, some in rows.items():
        if some:
            session.execute(
                insert(table_of(table)).on_conflict_do_nothing(index_elements=["boot_id", "seq"]), some
            )
    _move_cursor(session, boot_id, next_seq, dropped, now)
    return Drained(len(rows[RequestTiming]), len(rows[Step]), len(rows[RuntimeEvent]), num_bad)


def _move_cursor(session: Session, boot_id: str, next_seq: int, dropped: int, now: float) -> None:
    """Forward only: an answer that comes late a second time moves nothing back."""
    given = insert(table_of(DrainCursor)).values(
        boot_id=boot_id, after_seq=next_seq, num_dropped=dropped, updated_at=now
    )
    moved = {
        "after_seq": func.max(DrainCursor.after_seq, given.excluded.after_seq),
        "num_dropped": func.max(DrainCursor.num_dropped, given.excluded.num_dropped),
        "updated_at": given.excluded.updated_at,
    }
    session.execute(given.on_conflict_do_update(index_elements=["boot_id"], set_=moved))


def _row(boot_id: str, record: Record) -> tuple[type[MetricsBase], dict[str, Any]]:
    kind = record.get("kind")
    if kind == "request":
        return RequestTiming, _columns(RequestTiming, boot_id, record)
    if kind == "step":
        return Step, _columns(Step, boot_id, record)
    if kind == "event":
        return RuntimeEvent, _event(boot_id, record)
    raise _Bad(f"its kind must be request, step or event, but got {kind!r}")


def _event(boot_id: str, record: Record) -> dict[str, Any]:
    """An event's own kind is under `event`; whatever else it says goes into the details."""
    details = {name: value for name, value in record.items() if name not in ("seq", "at", "kind", "event")}
    event = {
        "seq": record.get("seq"),
        "at": record.get("at"),
        "kind": record.get("event"),
        "details": details,
    }
    return _columns(RuntimeEvent, boot_id, event)


def _columns(noun: type[MetricsBase], boot_id: str, record: Record) -> dict[str, Any]:
    """One row with every column of the table, as an executemany wants it."""
    row: dict[str, Any] = {"boot_id": boot_id}
    for name, default, is_required in _COLUMNS[noun]:
        value = record.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            if is_required:
                raise _Bad(f"`{name}` must be given, but got {value!r}")
            value = default
        row[name] = value
    return row


class _Column(NamedTuple):
    name: str
    default: Any
    is_required: bool


def _declared(noun: type[MetricsBase]) -> tuple[_Column, ...]:
    """The columns beside boot_id. What is JSON is {} where nothing is given."""
    columns = []
    for column in table_of(noun).columns:
        default = {} if isinstance(column.type, JSON) else getattr(column.default, "arg", None)
        if column.name != "boot_id":
            columns.append(_Column(column.name, default, is_required=default is None and not column.nullable))
    return tuple(columns)


_COLUMNS: dict[type[MetricsBase], tuple[_Column, ...]] = {
    noun: _declared(noun) for noun in (RequestTiming, Step, RuntimeEvent)
}
