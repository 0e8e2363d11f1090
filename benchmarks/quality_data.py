"""What a data set lacks for the quality protocol, said before anything is trained, and kinds of test items.

Defined for every data set: without times the file's order counts; users with too few positive interactions are left
out; items that nothing was learned about stay in the ranking, and tests that ask for one count; an item without a title
gets its SID from its other columns and from who took it. Left out: repairing any of it.
"""

from typing import Any

import numpy as np
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
    """Counts of what the data lack, as they stand in the last line."""
    dataset, split = question.dataset, question.split
    titles = dataset.items.column("title")
    users = len(pc.unique(dataset.exposures.column("user_id")))
    often = split.occurrences(question.items.num_rows)
    return {
        "protocol": split.name,
        "timestamps": timed(dataset),
        "interactions": int(positive(dataset.exposures).sum()),
        "users_in_log": users,
        "users_too_short": users - len(split.histories.starts) + 1,
        "users": len(split.test),
        "items": question.items.num_rows,
        "items_unseen": int((often == 0).sum()),
        "unseen_tests": int((often[targets(split)] == 0).sum()),
        "items_without_title": sum(not (title or "").strip() for title in titles.to_pylist()),
        "rejected_rows": dataset.rejected.num_rows,
        "duplicates": dataset.duplicates,
    }


def sentences(facts: dict[str, Any]) -> list[str]:
    """What to tell a reader about ``describe``'s counts; nothing where nothing is lacking."""
    f = facts
    said = {
        "The data have no times: the order of the file is taken, and ties cannot be shuffled.": not f["timestamps"],
        f"{f['users_too_short']} of {f['users_in_log']} users have fewer than {LEAST} positive interactions: "
        "left out.": f["users_too_short"],
        f"{f['items_unseen']} of {f['items']} items are never learned from; {f['unseen_tests']} of {f['users']} tests "
        "ask for one and count.": f["items_unseen"],
        f"{f['items_without_title']} of {f['items']} items have no title: their SIDs come from the other columns and "
        "from who took them.": f["items_without_title"],
        f"{f['rejected_rows']} rows could not be read and {f['duplicates']} were repeats: left out.": f["rejected_rows"]
        or f["duplicates"],
    }
    return [sentence for sentence, holds in said.items() if holds]
