"""Industrial rewards: declarative rules that damp or boost kinds of items (OneRec V1, arXiv 2506.13695, 4.3.3).

While a kind's share of what is served exceeds ``target_share`` its items' rewards are damped, ``r' = alpha r``: viral
or low-quality items. A rule with ``boost`` instead of ``alpha`` raises its kind while the share is *below* the target:
new authors, fresh items. Rules come from a TOML file, a list of ``[[rule]]`` tables. Ours: a negative reward is divided
where a positive one is multiplied, so that damping never helps an item; rules that hit the same item multiply.

Shapes: n items of a catalogue, R rules, rewards of any shape.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DAY_MS = 86_400_000
NAMES = ("tag", "author", "item")
NUMBERS = ("duration_s", "age_days", "popularity_rank")


class Rule(BaseModel):
    """One kind of items and what happens to their rewards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    attribute: Literal["tag", "author", "item", "duration_s", "age_days", "popularity_rank"]
    """``popularity_rank`` is the share of items that are less popular, in [0, 1): 0.99 is the top hundredth."""
    values: tuple[str, ...] = ()
    """The kind's tags, authors or items."""
    at_least: float | None = None
    """The kind's numbers: ``at_least <= x < below``."""
    below: float | None = None
    target_share: float = Field(ge=0, le=1)
    """Share of served items; units: 1 = everything."""
    alpha: float | None = Field(default=None, gt=0, lt=1)
    boost: float | None = Field(default=None, gt=1)

    @model_validator(mode="after")
    def _whole(self) -> "Rule":
        if (self.alpha is None) == (self.boost is None):
            raise ValueError(f"rule {self.name!r} needs either alpha (below 1) or boost (above 1)")
        bounded = self.at_least is not None or self.below is not None
        if self.attribute in NAMES and (not self.values or bounded):
            raise ValueError(f"rule {self.name!r} is about {self.attribute}: give values, and no bounds")
        if self.attribute in NUMBERS and (self.values or not bounded):
            raise ValueError(f"rule {self.name!r} is about {self.attribute}: give at_least or below, and no values")
        return self

    @property
    def factor(self) -> float:
        """What a positive reward is multiplied by while the rule is in force."""
        factor = self.alpha if self.alpha is not None else self.boost
        assert factor is not None, "a rule has one of them"
        return factor

    def in_force(self, share: float) -> bool:
        """Whether the kind is served too much (alpha) or too little (boost)."""
        return share > self.target_share if self.alpha is not None else share < self.target_share


def load_rules(path: Path) -> tuple[Rule, ...]:
    """The ``[[rule]]`` tables of a TOML file; raises ValueError saying which is wrong and why."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"the rules in {path} cannot be read: {error}") from error
    return parse_rules(text, str(path))


def parse_rules(text: str, where: str) -> tuple[Rule, ...]:
    """The ``[[rule]]`` tables of a TOML text found at ``where``; errors as ``load_rules``."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the rules in {where} cannot be read: {error}") from error
    if set(given) - {"rule"} or not isinstance(given.get("rule", []), list):
        raise ValueError(f"{where} holds {', '.join(sorted(given))}; expected [[rule]] tables only")
    try:
        rules = tuple(Rule(**each) for each in given.get("rule", []))
    except (ValidationError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if len({rule.name for rule in rules}) < len(rules):
        raise ValueError(f"{where} names a rule twice: {', '.join(rule.name for rule in rules)}")
    return rules


def kinds(rules: Sequence[Rule], items: pa.Table, popularity: np.ndarray, now_ms: int) -> np.ndarray:
    """bool [R, n]: which items (ITEM rows) each rule is about; an unknown attribute belongs to no kind."""
    found = np.zeros((len(rules), items.num_rows), bool)
    for row, rule in enumerate(rules):
        if rule.attribute in NAMES:
            found[row] = _named(items, rule)
            continue
        numbers = _numbers(items, popularity, now_ms, rule.attribute)
        low = -np.inf if rule.at_least is None else rule.at_least
        high = np.inf if rule.below is None else rule.below
        found[row] = (numbers >= low) & (numbers < high)  # NaN is neither
    return found


def shares(kinds_Rn: np.ndarray, served: np.ndarray) -> np.ndarray:
    """float64 [R]: share of the ``served`` items (int rows of the catalogue, -1 unknown) of each kind; 0 of nothing."""
    known = served[served >= 0]
    return kinds_Rn[:, known].mean(1) if len(known) else np.zeros(len(kinds_Rn))


def industrial_reward(
    rewards: np.ndarray, items: np.ndarray, rules: Sequence[Rule], kinds_Rn: np.ndarray, shares_R: np.ndarray
) -> tuple[np.ndarray, Mapping[str, float]]:
    """``rewards`` after the rules in force, and how many samples each rule touched.

    ``items`` (int, the shape of ``rewards``) are rows of the catalogue, -1 for samples that name no item: those stay as
    they are. Raises ValueError when shapes disagree.
    """
    if rewards.shape != items.shape or len(kinds_Rn) != len(rules) or len(shares_R) != len(rules):
        raise ValueError(
            f"rewards {rewards.shape} and items {items.shape} must agree, and {len(rules)} rules need as many kinds "
            f"and shares; given {len(kinds_Rn)} and {len(shares_R)}"
        )
    factor = np.ones(rewards.shape)
    touched: dict[str, float] = {}
    for rule, kind, share in zip(rules, kinds_Rn, shares_R, strict=True):
        hit = (items >= 0) & kind[np.maximum(items, 0)] if len(kind) else np.zeros(items.shape, bool)
        hit &= rule.in_force(float(share))
        factor[hit] *= rule.factor
        touched[f"industrial/{rule.name}"] = float(hit.mean()) if hit.size else 0.0
    # r' = alpha r; a negative reward grows worse by 1 / alpha
    changed = np.where(rewards >= 0, rewards * factor, rewards / factor)
    return changed.astype(rewards.dtype), touched


def _named(items: pa.Table, rule: Rule) -> np.ndarray:
    wanted = set(rule.values)
    if rule.attribute == "tag":
        return np.array([not wanted.isdisjoint(tags or ()) for tags in items.column("tags").to_pylist()], bool)
    column = items.column("author_id" if rule.attribute == "author" else "item_id")
    found: np.ndarray = pc.is_in(column, value_set=pa.array(sorted(wanted), pa.string())).to_numpy()
    return found


def _numbers(items: pa.Table, popularity: np.ndarray, now_ms: int, attribute: str) -> np.ndarray:
    """float64 [n], NaN where unknown."""
    if attribute == "duration_s":
        return items.column("duration_ms").to_numpy().astype(np.float64) / 1000
    if attribute == "age_days":
        uploaded = items.column("upload_time").cast(pa.int64()).to_pandas().to_numpy(np.float64, na_value=np.nan)
        return (now_ms - uploaded) / DAY_MS
    ordered = np.sort(popularity)
    return np.searchsorted(ordered, popularity, side="left") / max(len(popularity), 1)
