"""A model server as a pod runs it: a registry of its own, written by its init container; `helm test` is content."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from features.storage import Storage
from models.bundle import publish, set_alias

SMOKE = Path(__file__).parents[3] / "helm" / "onerec" / "files" / "smoke.py"


@pytest.mark.long
def test_the_registry_of_the_pod_serves_and_the_test_pod_is_content(
    s3: Storage, keys: dict[str, str], start_model_server: Any, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    version = publish(s3, write_bundle(tmp_path / "bundle"), data_time=datetime(2026, 1, 1, tzinfo=UTC))
    home = tmp_path / "pod"
    variables = {**os.environ, **{f"ONEREC_{name.upper()}": value for name, value in keys.items()}}
    init = [sys.executable, "-m", "features.repository"]
    subprocess.run(init, env=variables | {"ONEREC_HOME": str(home)}, check=True, capture_output=True)
    with start_model_server(tmp_path, s3, keys | {"home": str(home)}, "onerec=production") as server:
        asked = variables | {"ONEREC_SERVER_URL": server.url, "MODEL": "onerec", "ONEREC_CLIENT_TOKEN": "none"}
        asked |= {"ONEREC_COLLECTOR_URL": "http://127.0.0.1:9"}

        def smoke() -> str:
            return subprocess.run([sys.executable, SMOKE], env=asked, capture_output=True, text=True).stdout

        server.wait(lambda: server.client.get("/v2/health/live").status_code == 200)
        assert "FAIL a model is in service: 503" in smoke()
        set_alias(s3, "production", version)
        server.serving(version)
        told = smoke()
        assert "ok   a model is in service: 200" in told
        assert "ok   it recommends to somebody new: 200" in told
        # Nothing is known of the user, but the store was read: the registry has the views.
        assert "features_unavailable" not in server.infer(["nobody"]).text
