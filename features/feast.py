"""The door to Feast: what we use of it, imported without typeguard's run-time checks of Feast's own arguments.

Feast decorates its classes with ``typeguard.typechecked``, which parses and compiles each of them anew at every start:
3.0 of the 3.8 processor seconds that importing it takes, in every server, pipeline step and command. mypy checks our
calls. What Feast imports later, such as an on-line store, is checked as Feast wants it.
"""

from typing import Any

import typeguard


def _as_it_is(target: Any = None, **_: object) -> Any:
    """Stands in for ``typechecked``, with and without options."""
    return target if target is not None else _as_it_is


_checked = typeguard.typechecked
typeguard.typechecked = _as_it_is  # type: ignore[assignment]
try:
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType
    from feast.data_source import PushMode
    from feast.errors import FeastObjectNotFoundException, PushSourceNotFoundException
    from feast.repo_config import RepoConfig
    from feast.types import Array, Int64, String
finally:
    typeguard.typechecked = _checked

__all__ = [
    "Array",
    "Entity",
    "FeastObjectNotFoundException",
    "FeatureStore",
    "FeatureView",
    "Field",
    "FileSource",
    "Int64",
    "PushMode",
    "PushSource",
    "PushSourceNotFoundException",
    "RepoConfig",
    "String",
    "ValueType",
]
