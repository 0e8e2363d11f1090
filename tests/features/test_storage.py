"""Conditional writes on a real S3: of those who read the same object, one may write it."""

import pytest

from features.storage import ObjectChanged, Storage

KEY = "swapped.json"


def test_only_who_read_the_newest_may_write(s3: Storage) -> None:
    s3.swap(KEY, b"1", None)
    first = s3.tagged(KEY)
    assert first is not None
    with pytest.raises(ObjectChanged, match="written by somebody else"):
        s3.swap(KEY, b"mine", None)
    s3.swap(KEY, b"2", first[1])
    with pytest.raises(ObjectChanged):
        s3.swap(KEY, b"late", first[1])
    newest = s3.tagged(KEY)
    assert newest is not None
    assert newest[0] == b"2"


def test_what_was_removed_since_it_was_read_is_not_brought_back(s3: Storage) -> None:
    s3.swap(KEY, b"1", None)
    found = s3.tagged(KEY)
    assert found is not None
    s3.remove(KEY)
    with pytest.raises(ObjectChanged):
        s3.swap(KEY, b"2", found[1])
    assert s3.tagged(KEY) is None
