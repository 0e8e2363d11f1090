"""People and videos of the simulated world: topics, readable tags and titles, authors, tastes and attributes.

Every generator takes its own ``numpy`` Generator, so what one part draws never moves another. Left out: images, sound,
and relations between people.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from features.schema import ITEM, TIME, USER, conform
from features.world.calibration import (
    ACTIVE_DAYS_SHARE,
    DURATION_RANGE_S,
    DURATION_SHARE,
    NEXT_DAY_RETURN,
)

TOPICS = {
    "cooking": ("recipe", "noodles", "baking", "street food", "knife skills", "dessert"),
    "football": ("goals", "dribbling", "world cup", "goalkeeper", "street football", "tactics"),
    "basketball": ("dunk", "three pointer", "playoffs", "ankle breaker", "streetball", "rookie"),
    "gaming": ("speedrun", "boss fight", "esports", "sandbox", "retro game", "walkthrough"),
    "pets": ("kitten", "puppy", "parrot", "rescue", "funny cat", "dog training"),
    "travel": ("hidden beach", "night train", "old town", "road trip", "island", "backpacking"),
    "fashion": ("outfit", "streetwear", "thrift", "sneakers", "runway", "styling"),
    "make-up": ("skincare", "lipstick", "eyeliner", "hair", "nails", "transformation"),
    "music": ("guitar cover", "piano", "rap", "choir", "remix", "busking"),
    "dance": ("hip hop", "ballet", "shuffle", "choreography", "square dance", "dance battle"),
    "comedy": ("sketch", "prank", "stand-up", "parody", "office humour", "dad jokes"),
    "drama": ("short series", "plot twist", "romance", "costume drama", "revenge", "family story"),
    "cars": ("drifting", "restoration", "test drive", "supercar", "truck", "electric car"),
    "gadgets": ("phone review", "unboxing", "keyboard", "smart home", "drone", "laptop"),
    "science": ("experiment", "space", "physics", "chemistry", "volcano", "dinosaurs"),
    "history": ("ancient empire", "archaeology", "war story", "biography", "museum", "lost city"),
    "news": ("local news", "weather", "economy", "interview", "city life", "explained"),
    "fitness": ("home workout", "yoga", "running", "weights", "stretching", "weight loss"),
    "parenting": ("toddler", "school run", "bedtime", "crafts with kids", "newborn", "lunch box"),
    "farming": ("harvest", "tractor", "village life", "bee keeping", "orchard", "chickens"),
    "fishing": ("big catch", "river", "sea fishing", "lures", "ice fishing", "camp cooking"),
    "handcraft": ("woodwork", "pottery", "knitting", "origami", "metalwork", "miniature"),
    "painting": ("watercolour", "sketching", "graffiti", "portrait", "calligraphy", "digital art"),
    "magic": ("card trick", "illusion", "street magic", "coin trick", "mind reading", "escape"),
}
NAMES = tuple(TOPICS)
_TITLES = (
    "{0}: {1} and {2}",
    "{1}, the {0} way",
    "How {1} meets {2}",
    "A day of {1} | {0}",
    "{1} and {2} you must see",
)
_AGES = ("12-17", "18-23", "24-30", "31-40", "41-49", "50+")
_TIERS = ("tier1", "tier2", "tier3", "tier4", "rural")
_DEVICES = ("android-entry", "android-mid", "android-high", "ios")


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Videos as arrays of equal length (``topics`` [n, T], rows of unit length) beside their ITEM table."""

    table: pa.Table
    topics: np.ndarray
    main: np.ndarray
    quality: np.ndarray
    popularity: np.ndarray
    duration_ms: np.ndarray
    upload_day: np.ndarray

    def extend(self, more: "Videos") -> "Videos":
        """These videos followed by ``more``."""
        arrays = {
            name: np.concatenate([getattr(self, name), getattr(more, name)])
            for name in ("topics", "main", "quality", "popularity", "duration_ms", "upload_day")
        }
        return Videos(table=pa.concat_tables([self.table, more.table]), **arrays)


@dataclass(frozen=True, kw_only=True)
class People:
    """Users as arrays (``tastes`` [U, T], rows of unit length) beside their USER table."""

    table: pa.Table
    tastes: np.ndarray
    log_duration: np.ndarray
    activity: np.ndarray


def make_videos(
    rng: np.random.Generator, topic_share: np.ndarray, upload_ms: np.ndarray, start_ms: int, first: int
) -> Videos:
    """One video per ``upload_ms`` [n], numbered from ``first``; main topics drawn by ``topic_share`` [T]."""
    n, topics = len(upload_ms), len(NAMES)
    main = rng.choice(topics, n, p=topic_share)
    second = (main + rng.integers(1, topics, n)) % topics
    vectors = np.zeros((n, topics))
    vectors[np.arange(n), main] = 1.0
    vectors[np.arange(n), second] += rng.uniform(0, 0.6, n)
    quality = rng.normal(size=n)
    low, high = np.log(DURATION_RANGE_S[rng.choice(len(DURATION_SHARE), n, p=DURATION_SHARE / DURATION_SHARE.sum())]).T
    duration = np.rint(np.exp(rng.uniform(low, high)) * 1000).astype(np.int64)
    tags = [_tags(rng, int(a), int(b)) for a, b in zip(main, second, strict=True)]
    # Popularity follows a shifted power law of the rank by a noisy quality.
    rank = np.argsort(np.argsort(-(0.6 * quality + rng.normal(size=n))))
    table = pa.table(
        {
            "item_id": [f"v{first + i:05d}" for i in range(n)],
            "title": [_title(rng, NAMES[m], t) for m, t in zip(main, tags, strict=True)],
            "tags": pa.array(tags, pa.list_(pa.string())),
            "author_id": [f"a{m:02d}-{int(20 * u**2):02d}" for m, u in zip(main, rng.random(n), strict=True)],
            "music_id": [f"m{int(400 * u**1.5):03d}" for u in rng.random(n)],
            "duration_ms": duration,
            "upload_time": pa.array(upload_ms.astype(np.int64)).cast(TIME),
        }
    )
    return Videos(
        table=conform(table, ITEM),
        topics=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        main=main,
        quality=quality,
        popularity=-1.6 * np.log(rank / n * 2000 + 14.0),
        duration_ms=duration,
        upload_day=(upload_ms - start_ms) / 86_400_000,
    )


def make_people(rng: np.random.Generator, count: int, topic_share: np.ndarray) -> People:
    """``count`` users whose attributes correlate with their tastes."""
    tastes = draw_tastes(rng, count, topic_share)
    leanings = np.random.default_rng(7).normal(size=(len(NAMES), 4)) * 2.5
    leaning = tastes @ leanings + rng.normal(size=(count, 4)) * 0.5
    columns = {
        "age": _banded(leaning[:, 0], _AGES),
        "gender": _banded(leaning[:, 1], ("f", "m")),
        "city": _banded(leaning[:, 2], _TIERS),
        "device": _banded(leaning[:, 3], _DEVICES),
    }
    # Beta-distributed activity with the measured mean; a day's return after an active day is E[a^2] / E[a].
    spread = ACTIVE_DAYS_SHARE * (1 - ACTIVE_DAYS_SHARE) / (ACTIVE_DAYS_SHARE * (NEXT_DAY_RETURN - ACTIVE_DAYS_SHARE))
    activity = rng.beta(ACTIVE_DAYS_SHARE * (spread - 1), (1 - ACTIVE_DAYS_SHARE) * (spread - 1), count)
    columns["active"] = _banded(activity, ("low", "middle", "high"))
    attributes = [[f"{name}={values[u]}" for name, values in columns.items()] for u in range(count)]
    table = pa.table(
        {
            "user_id": [f"u{u:05d}" for u in range(count)],
            "attributes": pa.array(attributes, pa.list_(pa.string())),
        }
    )
    return People(
        table=conform(table, USER),
        tastes=tastes,
        log_duration=rng.normal(np.log(60), 0.8, count),
        activity=activity,
    )


def draw_tastes(rng: np.random.Generator, count: int, topic_share: np.ndarray) -> np.ndarray:
    """Unit taste vectors [count, T] on two to four topics drawn by ``topic_share``, over a faint general interest."""
    tastes = rng.uniform(0, 0.12, (count, len(topic_share)))
    order = np.argsort(np.log(topic_share + 1e-9) + rng.gumbel(size=tastes.shape), axis=1)[:, ::-1]
    liked = rng.integers(2, 5, count)
    for k in range(4):
        rows = np.flatnonzero(k < liked)
        tastes[rows, order[rows, k]] += rng.uniform(0.5, 1.0, len(rows)) * 0.85**k
    return tastes / np.linalg.norm(tastes, axis=1, keepdims=True)


def _banded(values: np.ndarray, names: tuple[str, ...]) -> list[str]:
    edges = np.quantile(values, np.arange(1, len(names)) / len(names))
    return [names[i] for i in np.digitize(values, edges)]


def _tags(rng: np.random.Generator, main: int, second: int) -> list[str]:
    own = [TOPICS[NAMES[main]][i] for i in rng.permutation(6)[: rng.integers(2, 4)]]
    if rng.random() < 0.4:
        own.append(TOPICS[NAMES[second]][rng.integers(6)])
    if rng.random() < 0.1:
        own.append(TOPICS[NAMES[rng.integers(len(NAMES))]][rng.integers(6)])
    return [NAMES[main], *dict.fromkeys(own)] if rng.random() < 0.8 else list(dict.fromkeys(own))


def _title(rng: np.random.Generator, topic: str, tags: list[str]) -> str:
    words = [t for t in tags if t != topic]
    text = _TITLES[rng.integers(len(_TITLES))].format(topic, words[0], words[1])
    return text[0].upper() + text[1:]
