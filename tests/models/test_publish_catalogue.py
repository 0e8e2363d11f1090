"""What publishing a bundle leaves in the catalogue: vectors of its items, and SIDs for items that came meanwhile."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from features import catalog, deltas
from features.runs import Run
from features.schema import ITEM, conform
from features.storage import connect
from models.bundle import read_alias, seal
from models.release import publish_run
from models.tokenizer.tokenizer import Tokenizer
from monitoring.quality import Decision, keep


def decision_on(made: Path, end: str) -> Decision:
    """A blessing of the content of ``made``."""
    sealed = seal(made, data_time=datetime.fromisoformat(end))
    return Decision(blessed=True, passed=(), failed=(), version=sealed["version"], digest=sealed["digest"])


def test_a_published_bundle_has_vectors_and_knows_items_that_came_while_it_was_trained(
    environment, write_bundle: Callable[..., Path], tiny_tokenizer: tuple, tmp_path: Path
) -> None:
    storage, made = connect(), write_bundle(tmp_path / "made")
    end = datetime(2026, 1, 2, tzinfo=UTC).isoformat()
    run = Run(storage, "run")

    def evaluated(folder: Path) -> dict:
        (folder / "bundle").mkdir()
        for file in made.iterdir():
            (folder / "bundle" / file.name).write_bytes(file.read_bytes())
        return {}

    run.stage("data", {"end": end}, lambda folder: {})
    run.stage("evaluate", {}, evaluated)
    keep(storage, "runs/run", decision_on(made, end))
    tokenizer, catalogue = tiny_tokenizer
    late = conform(pa.table({"item_id": ["late"], "tags": [["t2"]], "duration_ms": [7_000]}), ITEM)
    catalog.append_items(storage, catalogue.items)
    catalog.append_items(storage, late)
    version = publish_run("run", alias="production", base="")
    assert read_alias(storage, "production") == version
    (key,) = deltas.delta_keys(storage, version)
    items, sids = deltas.read_delta(storage, key)
    assert items["item_id"].to_pylist() == ["late"]
    assert sids.shape == (1, 3)
    vectors = catalog.read_vectors(storage)
    assert vectors is not None
    assert vectors.version == version
    assert vectors.item_ids.tolist() == catalogue.item_ids
    loaded: Tokenizer = tokenizer
    np.testing.assert_allclose(vectors.vectors, loaded.quantizer.reconstruct(catalogue.sids), rtol=1e-5)
    assert publish_run("run", alias="production", base="") == version, "repeating it changes nothing"
    assert deltas.delta_keys(storage, version) == [key]
