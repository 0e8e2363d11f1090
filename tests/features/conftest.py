"""A real log for the tests that want one: a KuaiRand-Pure folder named by ONEREC_TEST_KUAIRAND."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kuairand() -> Path:
    given = os.environ.get("ONEREC_TEST_KUAIRAND", "")
    if not given:
        pytest.skip("ONEREC_TEST_KUAIRAND does not name a KuaiRand-Pure folder")
    return Path(given)
