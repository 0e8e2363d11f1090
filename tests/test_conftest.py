"""The servers behind the other tests do what the code relies on."""

import pytest
import redis
import urllib3

from features.settings import Settings
from features.storage import ObjectMissing, Storage, connect


@pytest.mark.parametrize("n", range(2))
def test_bucket_is_fresh_each_time(s3: Storage, n: int) -> None:
    assert list(s3.keys("")) == []
    s3.put("a/b", bytes(str(n), "ascii"))
    assert s3.get("a/b") == bytes(str(n), "ascii")


def test_strangers_are_refused(s3: Storage) -> None:
    s3.put("a", b"1")
    assert urllib3.request("GET", f"http://{s3.endpoint}/{s3.bucket}/a", retries=False).status == 403


def test_environment_points_at_both(environment: Settings) -> None:
    storage = connect()
    with pytest.raises(ObjectMissing):
        storage.get("nothing")
    host, port = environment.redis.split(":")
    assert redis.Redis(host, int(port), password=environment.redis_password.get_secret_value()).ping()
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(host, int(port), retry=None).ping()
