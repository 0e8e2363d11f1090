"""The environment as it was set by hand: what is wrong with a variable is said by its name."""

from collections.abc import Iterator

import pytest

from features.settings import BadSetting, settings


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_a_wrong_variable_is_named_with_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEREC_RETENTION_DAYS", "many")
    monkeypatch.setenv("ONEREC_S3_SECURE", "perhaps")
    with pytest.raises(BadSetting) as error:
        settings()
    assert "ONEREC_RETENTION_DAYS='many': Input should be a valid number" in str(error.value)
    assert "ONEREC_S3_SECURE='perhaps': Input should be a valid boolean" in str(error.value)
    assert "pydantic" not in str(error.value)
    assert "unset it" in error.value.hint
    monkeypatch.setenv("ONEREC_RETENTION_DAYS", "7.5")
    monkeypatch.setenv("ONEREC_S3_SECURE", "true")
    assert (settings().retention_days, settings().s3_secure) == (7.5, True)


@pytest.mark.parametrize("name", ["S3_ENDPOINT", "REDIS"])
def test_an_address_is_no_url(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ONEREC_{name}", "http://store:9000")
    with pytest.raises(BadSetting, match=f"ONEREC_{name}='http://store:9000': .*expected host:port"):
        settings()
