"""Names and types of every record that crosses a module boundary: the one place for them.

Three kinds of events (``served``, ``impression``, ``feedback``) are joined by ``exposure_id`` into an
*exposure*, the unit of training (docs/data.md). Times are UTC with millisecond precision, durations are
milliseconds. Left out: transport validation of client events (``features.intake.events``).
"""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

TIME = pa.timestamp("ms", tz="UTC")

FLAGS = ("click", "like", "follow", "comment", "forward", "collect", "dislike", "profile_enter", "long_view")
"""Feedback flags in bit order: bit ``i`` of a label mask is ``FLAGS[i]``."""

SOURCES = ("onerec", "cascade", "organic")

EXPOSURE = pa.schema(
    [
        pa.field("exposure_id", pa.string(), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("sid", pa.list_(pa.int32())),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("event_time", TIME, nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("model_version", pa.string()),
        pa.field("log_probs", pa.list_(pa.float32())),
        pa.field("duration_ms", pa.int64(), nullable=False),
        pa.field("play_ms", pa.int64(), nullable=False),
        *(pa.field(flag, pa.bool_(), nullable=False) for flag in FLAGS),
    ]
)

ITEM = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("author_id", pa.string()),
        pa.field("music_id", pa.string()),
        pa.field("duration_ms", pa.int64(), nullable=False),
        pa.field("upload_time", TIME),
    ]
)

USER = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("attributes", pa.list_(pa.string())),
    ]
)
"""``attributes`` are ``name=value`` strings; the user-static pathway hashes them."""

SERVED = pa.schema(
    [
        pa.field("exposure_id", pa.string(), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("sid", pa.list_(pa.int32()), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
        pa.field("log_probs", pa.list_(pa.float32()), nullable=False),
        pa.field("event_time", TIME, nullable=False),
    ]
)

IMPRESSION = pa.schema(
    [
        pa.field("exposure_id", pa.string(), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("event_time", TIME, nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("duration_ms", pa.int64(), nullable=False),
    ]
)

FEEDBACK = pa.schema(
    [
        pa.field("exposure_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("event_time", TIME, nullable=False),
        pa.field("play_ms", pa.int64(), nullable=False),
        *(pa.field(flag, pa.bool_(), nullable=False) for flag in FLAGS),
    ]
)

EVENTS = {"served": SERVED, "impression": IMPRESSION, "feedback": FEEDBACK}


def exposure_id(request_id: str, model_version: str, slot: int) -> str:
    """Idempotent id of one shown slot: the same request, model and slot always give the same id."""
    return hashlib.blake2b(f"{request_id}\x1f{model_version}\x1f{slot}".encode(), digest_size=16).hexdigest()


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with exactly the columns and types of ``schema``; missing nullable columns become null.

    Raises ValueError naming the column when a required one is missing or holds nulls.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise ValueError(f"column {field.name!r} is missing; the columns given are {table.column_names}")
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            raise ValueError(f"column {field.name!r} holds {column.null_count} nulls; it must hold none")
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.table(columns, schema=schema)


def label_bits(table: pa.Table) -> pa.Array:
    """Feedback flags of ``table`` packed into one int64 per row, bit ``i`` = ``FLAGS[i]``."""
    bits = pa.array([0] * table.num_rows, pa.int64()) if table.num_rows else pa.array([], pa.int64())
    for shift, flag in enumerate(FLAGS):
        bits = pc.add(bits, pc.multiply(pc.cast(table.column(flag), pa.int64()), 1 << shift))
    return bits
