"""The join of served, impression and feedback rows by ``exposure_id``, and the merge of repeated exposures.

Events arrive at least once and in any order, so both merge rows of one id in a way that does not care, the way
``features.histories.windows`` does on-line: earliest impression, longest play time, union of the flags; a served row
adds SID, log-probabilities and model version. Pure functions of tables; storing is ``features.intake.exposures``.
Left out: retracted feedback (an un-like).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.intake.partitions import milliseconds
from features.intake.rejected import Rejected
from features.schema import EXPOSURE, FEEDBACK, FLAGS, IMPRESSION, SERVED, conform

_FROM_SERVED = ("sid", "model_version", "log_probs")
_IDENTITY = ("position", "model_version", "source", "request_id", "user_id", "item_id")
_GROWING = ("play_ms", "duration_ms", *FLAGS)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The exposures of a set of events, and the events that found no partner."""

    exposures: pa.Table
    """EXPOSURE, sorted by event time, each exposure_id once."""
    served_without_impression: pa.Table
    impressions_without_served: pa.Table
    """Only of source onerec: nobody else writes served rows."""
    feedback_without_impression: pa.Table
    exposures_without_feedback: int
    rejected: list[Rejected]


def join(served: pa.Table, impressions: pa.Table, feedback: pa.Table) -> Joined:
    """Joins SERVED, IMPRESSION and FEEDBACK rows by exposure_id.

    The item of a served row wins, since the server knows what it sent. An impression or feedback row that names
    another user than its partner is rejected: it would write into a stranger's history.
    """
    served, impressions = conform(served, SERVED), conform(impressions, IMPRESSION)
    feedback = conform(feedback, FEEDBACK)
    strange = _differs(impressions, served, rows_of(impressions, served))
    shown = _earliest(impressions.filter(pa.array(~strange)))
    sent = _best_served(served, shown)
    at = rows_of(feedback, shown)
    foreign = _differs(feedback, shown, at)
    orphans = (at < 0) & (rows_of(feedback, impressions) < 0)
    at[foreign] = -1
    exposures = _assemble(shown, served.take(pa.array(sent, mask=sent < 0)), feedback.filter(pa.array(at >= 0)), at)
    unserved = (sent < 0) & np.asarray(pc.equal(shown.column("source"), "onerec"))
    return Joined(
        exposures=exposures.sort_by([("event_time", "ascending"), ("exposure_id", "ascending")]),
        served_without_impression=served.filter(pa.array(rows_of(served, impressions) < 0)),
        impressions_without_served=shown.filter(pa.array(unserved)),
        feedback_without_impression=feedback.filter(pa.array(orphans)),
        exposures_without_feedback=shown.num_rows - len(np.unique(at[at >= 0])),
        rejected=[
            *_reasons("impression", "user_id differs from that of the served row", impressions, strange),
            *_reasons("feedback", "user_id differs from that of the impression", feedback, foreign),
        ],
    )


def merge(exposures: pa.Table) -> pa.Table:
    """EXPOSURE rows with each exposure_id once, sorted by (event_time, exposure_id); independent of their order."""
    codes = pc.dictionary_encode(exposures.column("exposure_id").combine_chunks()).indices.to_numpy()
    repeated = np.bincount(codes)[codes] > 1
    if repeated.any():
        once = exposures.filter(pa.array(~repeated))
        exposures = pa.concat_tables([once, _merged(exposures.filter(pa.array(repeated)), codes[repeated])])
    return exposures.sort_by([("event_time", "ascending"), ("exposure_id", "ascending")])


def _merged(exposures: pa.Table, codes: np.ndarray) -> pa.Table:
    """One row per code: the smallest row, served ones first, with the joined feedback and the earliest time.

    The order of rows ignores time and feedback, which merging changes: so merging in steps gives the same.
    """
    ranks = [pc.rank(exposures.column(name), tiebreaker="dense").to_numpy() for name in _IDENTITY]
    log_probs = pc.list_element(pc.fill_null(exposures.column("log_probs"), [0.0]), 0).to_numpy()
    unserved = exposures.column("log_probs").is_null().to_numpy()
    order = np.lexsort((*ranks, log_probs, unserved, codes))
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    columns = {name: np.maximum.reduceat(_numbers(exposures, name)[order], starts) for name in _GROWING}
    columns["event_time"] = np.minimum.reduceat(milliseconds(exposures)[order], starts)
    return _replaced(exposures.take(pa.array(order[starts])), columns)


def _earliest(impressions: pa.Table) -> pa.Table:
    ordered = impressions.sort_by([("event_time", "ascending"), ("item_id", "ascending"), ("position", "ascending")])
    codes = pc.dictionary_encode(ordered.column("exposure_id").combine_chunks()).indices.to_numpy()
    return ordered.take(pa.array(np.sort(np.unique(codes, return_index=True)[1])))


def rows_of(table: pa.Table, partners: pa.Table) -> np.ndarray:
    """int64 [rows of table]: the row of ``partners`` with the same exposure_id, -1 when there is none."""
    rows = pc.index_in(table.column("exposure_id"), value_set=partners.column("exposure_id").combine_chunks())
    return np.array(rows.fill_null(-1).to_numpy(), np.int64)


def _best_served(served: pa.Table, impressions: pa.Table) -> np.ndarray:
    """int64 [impressions]: the row of ``served`` each shows, -1 for none.

    A request retried with sampling can have sent two items under one id: the one that was seen is preferred.
    """
    at = rows_of(served, impressions)
    found = np.flatnonzero(at >= 0)
    partners = impressions.take(pa.array(at[found]))
    other_item = np.asarray(pc.not_equal(served.column("item_id").take(pa.array(found)), partners.column("item_id")))
    order = np.lexsort((milliseconds(served)[found], other_item, at[found]))
    shown, first = np.unique(at[found][order], return_index=True)
    best = np.full(impressions.num_rows, -1, np.int64)
    best[shown] = found[order][first]
    return best


def _differs(table: pa.Table, partners: pa.Table, rows: np.ndarray) -> np.ndarray:
    """bool [table]: user_id differs from that of row ``rows`` of ``partners``; False where ``rows`` is -1."""
    theirs = partners.column("user_id").take(pa.array(rows, mask=rows < 0))
    return np.array(pc.not_equal(table.column("user_id"), theirs).fill_null(False))


def _assemble(shown: pa.Table, sent: pa.Table, feedback: pa.Table, at: np.ndarray) -> pa.Table:
    """EXPOSURE rows: impressions, the served row beside each (nulls for none) and the merged feedback.

    ``at`` holds the row of ``shown`` of each feedback row, -1 for those that are not in ``feedback``.
    """
    columns: dict[str, Any] = {name: shown.column(name) for name in IMPRESSION.names}
    columns["item_id"] = pc.coalesce(sent.column("item_id"), shown.column("item_id"))
    columns |= {name: sent.column(name) for name in _FROM_SERVED}
    rows = at[at >= 0]
    told = {name: np.zeros(shown.num_rows, np.int64) for name in ("play_ms", *FLAGS)}
    for name, merged in told.items():
        np.maximum.at(merged, rows, _numbers(feedback, name))
    return _replaced(pa.table(columns), told)


def _replaced(table: pa.Table, numbers: dict[str, np.ndarray]) -> pa.Table:
    """``table`` in the EXPOSURE schema with the columns of ``numbers`` (int64) in place of its own."""
    arrays = {name: table.column(name) for name in table.column_names}
    arrays |= {name: pa.array(column).cast(EXPOSURE.field(name).type) for name, column in numbers.items()}
    return pa.table([arrays[name] for name in EXPOSURE.names], schema=EXPOSURE)


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return pc.cast(table.column(name), pa.int64()).to_numpy()


def _reasons(kind: str, reason: str, table: pa.Table, mask: np.ndarray) -> list[Rejected]:
    return [Rejected(kind, reason, row) for row in table.filter(pa.array(mask)).to_pylist()]
