"""What a data set lacks for the quality protocol, said before anything is trained, and kinds of test items.

Defined for every data set: without times the file's order counts; users with too few positive interactions are left
out; items that nothing was learned about stay in the ranking, and tests that ask for one count; an item without a title
gets its SID from its other columns and from who took it. Left out: repairing any of it.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.leave_one_out import LEAST
from benchmarks.protocol import Split
from benchmarks.quality_models import Question
from features.datasets import Dataset
from features.datasets.interactions import OLDEST_MS
from models.tokenizer.interactions import positive, times

COLD, HEAD = 3, 0.1
"""A cold item stands at most so often in what is learned from; the head is the most frequent tenth."""


def timed(dataset: Dataset) -> bool:
    """Whether any interaction has a time; loaders number the interactions of a log without one from the epoch on."""
    return bool(times(dataset.exposures).max(initial=0) >= OLDEST_MS)


def kinds(question: Question) -> np.ndarray:
    """int8 per test: -2 an item never learned from, -1 another cold one, 1 one of the head, 0 between."""
    often = question.split.occurrences(question.items.num_rows)
    seen = often[targets(question.split)]
    # An item of the head may not be cold as well: in a small log most items stand alike often.
    border = max(float(np.quantile(often, 1 - HEAD)), COLD + 1)
    return np.select([seen == 0, seen <= COLD, seen >= border], [-2, -1, 1], 0).astype(np.int8)


def targets(split: Split) -> np.ndarray:
    """int32 per test: the item asked for."""
    return split.histories.item[split.test]


def describe(question: Question) -> dict[str, Any]:
    """Counts of what the data lack, as they stand in the last line; raises ValueError where nothing can be tested."""
    dataset = question.dataset
    if dataset.items.num_rows < 2:
        raise ValueError(f"the data have {dataset.items.num_rows} item; to rank items takes at least 2")
    split = question.split
    titles = dataset.items.column("title")
    users = len(pc.unique(dataset.exposures.column("user_id")))
    often = split.occurrences(question.items.num_rows)
    return {
        "protocol": split.name,
        "timestamps": timed(dataset),
        "interactions": int(positive(dataset.exposures).sum()),
        "interactions_untimed": dataset.untimed,
        "users_unordered": dataset.unordered,
        "users_in_log": users,
        "users_too_short": users - len(split.histories.starts) + 1,
        "users": len(split.test),
        "items": question.items.num_rows,
        "items_unseen": int((often == 0).sum()),
        "unseen_tests": int((often[targets(split)] == 0).sum()),
        "repeat_tests": sum(
            split.histories.item[place] in split.histories.seen(place) for place in split.test.tolist()
        ),
        "items_without_title": sum(not (title or "").strip() for title in titles.to_pylist()),
        "rejected_rows": dataset.rejected.num_rows,
        "duplicates": dataset.duplicates,
        "digest": digest(dataset),
    }


def digest(dataset: Dataset) -> str:
    """Names the content: data sets of equal interactions and items have the same."""
    found = hashlib.sha256()
    for table in (dataset.exposures, dataset.items):
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        found.update(stream.getvalue())
    return found.hexdigest()[:8]


def sentences(facts: dict[str, Any]) -> list[str]:
    """What to tell a reader about ``describe``'s counts; nothing where nothing is lacking."""
    f = facts
    said = {
        "The data have no times from 1990 to today: the order of the file is taken, and ties cannot be "
        "shuffled.": not f["timestamps"],
        f"{f['interactions_untimed']} interactions have no time from 1990 to today: each takes that of the one before "
        "it, and is shuffled with it.": f["timestamps"] and f["interactions_untimed"],
        f"The times of {f['users_unordered']} users run backwards: the order of their lists is taken; if the times are "
        "right, sort the lists by them.": f["users_unordered"],
        f"{f['users_too_short']} of {f['users_in_log']} users have fewer than {LEAST} positive interactions: "
        "left out.": f["users_too_short"],
        f"{f['items_unseen']} of {f['items']} items are never learned from; {f['unseen_tests']} of {f['users']} tests "
        "ask for one and count.": f["items_unseen"],
        f"{f['repeat_tests']} of {f['users']} tests ask for an item that the user had before: histories are masked, so "
        "these count as misses.": f["repeat_tests"],
        f"{f['items_without_title']} of {f['items']} items have no title: their SIDs come from the other columns and "
        "from who took them.": f["items_without_title"],
        f"{f['rejected_rows']} rows could not be read and {f['duplicates']} were repeats: left out.": f["rejected_rows"]
        or f["duplicates"],
    }
    return [sentence for sentence, holds in said.items() if holds]
