"""Feast definitions: one entity, the user, and one feature view per behaviour pathway.

``user_static`` and ``lifelong`` are snapshots: read point-in-time for training, their latest rows written on-line.
``short_term`` and ``positive_feedback`` live on-line only, pushed by the one updater; training folds them from
the exposure log with the same function, however long ago the user was last seen, hence their long TTL. Their Parquet
sources hold the schema, no rows.

``feast apply`` executes every module of this folder, so it holds definitions only.
"""

from datetime import timedelta
from pathlib import Path

from features.feast import (
    Array,
    Entity,
    FeatureView,
    Field,
    FileSource,
    Int64,
    PushSource,
    String,
    ValueType,
)
from features.settings import settings

FOREVER = timedelta(days=3650)

WINDOW_SCHEMA = [
    Field(name=name, dtype=Array(String) if name == "item_ids" else Array(Int64))
    for name in ("ids", "item_ids", "times", "play_ms", "duration_ms", "labels")
]

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING, description="A user of the app.")


def snapshot(home: Path, name: str) -> FileSource:
    """The Parquet snapshot ``<home>/<name>.parquet`` as an off-line source."""
    return FileSource(name=f"{name}_snapshot", path=str(home / f"{name}.parquet"), timestamp_field="event_timestamp")


def feature_views(home: Path) -> list[FeatureView]:
    """The four views over the snapshots in ``home`` (an absolute folder)."""

    def view(
        name: str, schema: list[Field], ttl: timedelta, source: FileSource | PushSource, about: str
    ) -> FeatureView:
        key = Field(name="user_id", dtype=String)
        return FeatureView(
            name=name, entities=[user], schema=[key, *schema], ttl=ttl, source=source, online=True, description=about
        )

    return [
        view(
            "user_static",
            [Field(name="static", dtype=Array(Int64))],
            FOREVER,
            snapshot(home, "user_static"),
            "Hashed user attributes.",
        ),
        view(
            "short_term",
            WINDOW_SCHEMA,
            FOREVER,
            PushSource(name="short_term_push", batch_source=snapshot(home, "short_term")),
            "The latest exposures, oldest first.",
        ),
        view(
            "positive_feedback",
            WINDOW_SCHEMA,
            FOREVER,
            PushSource(name="positive_feedback_push", batch_source=snapshot(home, "positive_feedback")),
            "The latest exposures with high engagement, oldest first.",
        ),
        view(
            "lifelong",
            WINDOW_SCHEMA,
            timedelta(days=60),
            snapshot(home, "lifelong"),
            "Watched views, or clusters of them, as known at the last midnight, oldest first.",
        ),
    ]


user_static, short_term, positive_feedback, lifelong = feature_views(settings().home.absolute() / "feast")
