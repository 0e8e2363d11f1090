"""Opens the Feast repository of ``features/store`` with addresses from the settings instead of the environment.

The same YAML serves ``feast apply`` and this module; only here may several homes live in one process.

The registry is a file without a lock that says what the code says. Where no folder is shared, each process therefore
gets its own, from the definitions it was built with: ``python -m features.repository`` writes it.
"""

import logging
from pathlib import Path
from typing import Any

import yaml
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry

from features.feast import FeatureStore, RepoConfig
from features.settings import Settings, settings

# On a file registry Feast warns that serving while materializing "typically has no effect"; SQL registries need it.
logging.getLogger("feast.repo_config").setLevel(logging.ERROR)

REPOSITORY = Path(__file__).parent / "store"


def feast_home(config: Settings | None = None) -> Path:
    """The absolute folder of registry and snapshots, ``<ONEREC_HOME>/feast``."""
    return (config or settings()).home.absolute() / "feast"


def open_store(home: Path | None = None, config: Settings | None = None, *, offline: bool = False) -> FeatureStore:
    """The feature store whose registry and snapshots live in ``home`` (default ``feast_home``); opens no connection.

    Without ``offline`` it needs no DuckDB, which the serving image does not carry.
    """
    config = config or settings()
    text = (REPOSITORY / "feature_store.yaml").read_text()
    values = {
        "${ONEREC_HOME}/feast": str((home or feast_home(config)).absolute()),
        "${ONEREC_REDIS}": config.redis,
        "${ONEREC_REDIS_PASSWORD}": config.redis_password.get_secret_value(),
    }
    for name, value in values.items():
        text = text.replace(name, value)
    repository = yaml.safe_load(text)
    if not offline:
        del repository["offline_store"]
    return FeatureStore(config=RepoConfig(**repository, repo_path=REPOSITORY))


def redis_client(store: FeatureStore) -> Any:
    """The Redis client that ``store`` reads and writes through, told to give up within a second.

    Its default sleeps between three retries, which turns a dead server into seconds of waiting, and Feast's connection
    string cannot say otherwise. One immediate retry covers a pooled connection cut by a restart; timeouts have none.
    """
    client = store._get_provider().online_store._get_client(store.config.online_store)  # type: ignore[attr-defined]
    client.set_retry(Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)))
    return client


def write_registry(home: Path | None = None, config: Settings | None = None) -> Path:
    """Registers the definitions in ``home`` (default ``feast_home``) for readers and pushers; returns the registry.

    Needs neither DuckDB nor a server nor snapshots, unlike ``features.offline.apply``, which trains from the same.
    """
    # Here, because the definitions are made for the configured home when they are imported.
    from features.store.definitions import feature_views, user

    folder = (home or feast_home(config)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    open_store(folder, config).apply([user, *feature_views(folder)])
    return folder / "registry.db"


if __name__ == "__main__":
    print(write_registry())
