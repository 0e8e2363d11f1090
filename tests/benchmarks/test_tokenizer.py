from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import quantisers
from benchmarks.tokenizer import KINDS, Bench, tasks
from features.schema import FLAGS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two users who like five items each in a row, and one who likes two."""
    users, rows = [*"aaaaabbbbbcc"], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    n = len(users)
    items = pa.table({"item_id": [f"i{k}" for k in range(10)], "duration_ms": [0] * 10})
    exposures = pa.table(
        {
            "exposure_id": [f"e{k}" for k in range(n)],
            "request_id": [f"r{k}" for k in range(n)],
            "user_id": users,
            "item_id": [f"i{row}" for row in rows],
            "position": np.zeros(n, np.int32),
            "event_time": 1_700_000_000_000 + np.arange(n) * 1000,
            "source": ["organic"] * n,
            "duration_ms": np.zeros(n, np.int64),
            "play_ms": np.zeros(n, np.int64),
            **{flag: np.full(n, flag == "long_view") for flag in FLAGS},
        }
    )
    pq.write_table(items, tmp_path / "items.parquet")
    pq.write_table(exposures, tmp_path / "exposures.parquet")
    return tmp_path


def test_the_last_two_positives_are_held_out_and_make_the_pairs(folder: Path) -> None:
    bench = Bench.open(folder, folder / "out", quick=True)
    assert np.flatnonzero(bench.held_out).tolist() == [3, 4, 8, 9]
    assert bench.training.num_rows == 8
    assert bench.pairs.tolist() == [[3, 4], [8, 9]]


def test_without_titles_there_is_no_detail_to_measure(folder: Path) -> None:
    bench = Bench.open(folder, folder / "out", quick=True)
    assert bench.kinds == ["aligned", "content", "collaborative"]
    names = [name for _, name, _ in tasks(False, 3, bench.kinds)]
    assert len(names) == len(set(names))
    assert not [name for name in names if "detailed" in name]
    assert {f"ablation-{levels}x{codes}-2" for levels in (3, 4) for codes in (128, 512)} <= set(names)


def test_the_aligned_and_the_detailed_embedding_are_of_one_network(folder: Path) -> None:
    bench = Bench.open(folder, folder / "out", quick=True)
    titles = pa.array([f"lacquer shade {k}" for k in range(10)])
    items = bench.items.set_column(bench.items.column_names.index("title"), "title", titles)
    bench = Bench(items, bench.exposures, bench.output, True)
    aligned, detailed = bench.embedding("aligned"), bench.embedding("detailed")
    assert bench.kinds == list(KINDS)
    assert (np.einsum("nd,nd->n", aligned, detailed) > 0.8).all()
    assert not np.allclose(aligned, detailed, atol=0.05)


def test_what_was_measured_is_not_measured_again(folder: Path) -> None:
    bench = Bench.open(folder, folder / "out", quick=True)
    calls = []

    def measure() -> dict[str, object]:
        calls.append(1)
        return {"value": np.float32(0.5)}

    assert bench.kept("part", measure)["value"] == 0.5
    assert bench.kept("part", measure)["value"] == 0.5
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("name", sorted(quantisers.rivals()))
def test_every_rival_gives_codebooks_that_rebuild_the_rows(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    fitted = quantisers.rivals()[name](x, 2, 24)
    found = quantisers.measured(x, fitted, np.array([[0, 1], [2, 3]]))
    assert fitted.sids.shape == (300, 2)
    assert found["mse_share_of_variance"][1] < found["mse_share_of_variance"][0] < 1
    assert found["unique_sid_share"] < found["unique_after_separation"] == 1
