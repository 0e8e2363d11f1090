import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.histories.requests import Requests, requests
from features.histories.windows import Limits
from features.schema import EXPOSURE, FLAGS, conform
from models.onerec_session import SessionConfig
from models.training.data import Batches, Contexts, RunData
from models.training.pretrain import PretrainConfig, pretrain
from models.training.sessions import (
    SessionQuality,
    first_of_each,
    first_views,
    high_quality,
    really_watched,
    session_targets,
)

QUALITY = SessionQuality(watched=3, watched_ms=2_000, total_ms=10_000, engagements=1)


def log_of(*lists: list[tuple[str, int, bool]]) -> tuple[Requests, np.ndarray, np.ndarray]:
    """Requests with their (item, play time, liked), the play times and whether liked."""
    rows = [(f"r{r}", place, *view) for r, views in enumerate(lists) for place, view in enumerate(views)]
    order = np.random.default_rng(0).permutation(len(rows))  # the table's order must not matter
    names, position, item, play, liked = zip(*(rows[i] for i in order), strict=True)
    columns = {
        "exposure_id": [f"{name}-{place}" for name, place in zip(names, position, strict=True)],
        "request_id": names,
        "user_id": ["u"] * len(rows),
        "item_id": item,
        "position": position,
        "event_time": np.arange(len(rows))[order] + 1_767_225_600_000,
        "source": ["organic"] * len(rows),
        "duration_ms": np.full(len(rows), 20_000),
        "play_ms": play,
        **{flag: np.zeros(len(rows), bool) for flag in FLAGS},
    }
    table = conform(pa.table(columns), EXPOSURE)
    return requests(table), np.array(play), np.array(liked)


GOOD = [("a", 4_000, False), ("b", 3_000, True), ("c", 3_000, False), ("d", 100, False)]


def test_each_condition_alone_can_fail_a_session() -> None:
    too_few = [("a", 9_000, True), ("b", 9_000, True), ("c", 1_000, False)]
    too_short = [("a", 3_000, True), ("b", 3_000, False), ("c", 3_000, False)]
    indifferent = [(item, play, False) for item, play, _ in GOOD]
    grouped, play, liked = log_of(GOOD, too_few, too_short, indifferent)
    watched = really_watched(play, np.full(len(play), 20_000), QUALITY)
    assert high_quality(grouped, play, watched, liked, QUALITY).tolist() == [True, False, False, False]
    lenient = replace(QUALITY, engagements=0)
    assert high_quality(grouped, play, watched, liked, lenient).tolist() == [True, False, False, True]


def test_watched_is_long_enough_or_to_the_end() -> None:
    play, duration = np.array([1_999, 2_000, 900, 899, 0, 0]), np.array([9_000, 9_000, 900, 900, 5_000, 0])
    assert really_watched(play, duration, QUALITY).tolist() == [False, True, True, False, False, False]


def test_the_first_selected_views_in_the_order_shown() -> None:
    grouped, play, _ = log_of(GOOD, GOOD[:2], [("e", 1, False), *GOOD])
    chosen = first_of_each(grouped, play >= 3_000, 3)
    shown = [play[grouped.rows_of(r)][chosen[grouped.rows_of(r)]].tolist() for r in range(3)]
    assert shown == [[4_000, 3_000, 3_000], [], [4_000, 3_000, 3_000]]
    again = log_of([("a", 1, False), ("b", 1, False), ("a", 9, False)], [("a", 1, False)])[0]
    item = np.empty(len(again.rows), np.int64)
    item[again.rows] = [0, 1, 0, 0]
    assert first_views(again, item)[again.rows].tolist() == [True, True, False, True]


def test_batches_hold_whole_sessions_in_order(log) -> None:  # type: ignore[no-untyped-def]
    """On the training log: every sample is ``items`` watched videos of one request, in the order shown."""
    data = RunData.load(log.folder)
    contexts = Contexts(data, log.catalogue, Limits())
    quality = SessionQuality(watched=3, watched_ms=2_000, total_ms=30_000, engagements=0)
    mask = session_targets(data, contexts, 3, quality)
    assert 0 < mask.sum() < len(data)
    batches = Batches(data, contexts, log.catalogue, mask, batch_requests=8)
    assert batches.examples == mask.sum()
    position, request, play = (data.column(name) for name in ("position", "request_id", "play_ms"))
    for step in range(len(batches)):
        rows = batches(step).exposures
        assert rows.shape[1] == 3
        assert (rows >= 0).all()
        assert (np.diff(position[rows], axis=1) > 0).all()
        assert all(len(set(names)) == 1 for names in request[rows])
        assert (play[rows] >= 2_000).all()
        assert all(len(set(items)) == 3 for items in batches(step).items.tolist())


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="watched must be at least 1"):
        SessionQuality(watched=0)


def test_a_session_model_trains_on_good_sessions_only(log, write_log, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """With likes in the log there are good sessions, and the loss falls; without them training says what is missing."""
    model = SessionConfig(
        codes=8, d_model=16, heads=2, kv_groups=1, embed=8, items=3, encoder_layers=1, decoder_layers=1, ffn=16
    )
    config = PretrainConfig(epochs=30, batch_requests=8, max_steps=40, threads=1, learning_rate=1e-2, log_every=1)
    table = log.exposures
    place = table.schema.get_field_index("like")
    likes = table.set_column(place, table.schema.field(place), table.column("long_view"))
    liked = write_log(tmp_path / "data", likes)
    fitted = pretrain(liked.folder, liked.catalogue, model, config, tmp_path / "out")
    data = RunData.load(liked.folder)
    quality = SessionQuality(watched=3)
    targets = session_targets(data, Contexts(data, liked.catalogue, Limits()), 3, quality) & ~data.held_out
    assert fitted["exposures_per_epoch"] == targets.sum() > 0
    steps = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(steps[-5:]) < np.mean(steps[:5])
    with pytest.raises(ValueError, match="0 fit to be a target"):
        pretrain(log.folder, log.catalogue, model, config, tmp_path / "none")
