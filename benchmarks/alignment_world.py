"""The alignment benchmark's world of one seed: people, their log, a pre-trained model, a reward model, and the judge.

The world is the scenario ``laboratory``, or a user model fitted on a log. Held-out users are in no training data;
their lists are judged by what the world truly expects of them (``expected``). Tokenizer, policy and reward model are
made from the organic log of the others, and every arm begins with these. Left out: new videos, drift.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.torch import save_file

from benchmarks.alignment_data import contexts_of, write_log
from benchmarks.harness import kept, place
from benchmarks.trained import model_in, unpublished
from features.datasets import Dataset, load
from features.histories.context import Context
from features.world.simulator import Simulator, SimulatorConfig, world_hash
from features.world.usermodel import UserModel, UserModelConfig
from models.decoding.trie import Trie
from models.generator import Generator
from models.presets import WEIGHTS
from models.rewards.reward import REWARD, RewardModel, load_reward
from models.serving.recommender import Recommender
from models.sizes import preset
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.tokenizer.vocabulary import Catalogue
from models.training.pretrain import PretrainConfig, pretrain
from models.training.reward import RewardConfig, train_reward

LIST = 10
BEAM = 64
HOUR_MS = 3_600_000
WORLD = SimulatorConfig.scenario("laboratory")
"""What the printed hash names; the seed of a world is the only thing that differs."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the laboratory is; the budget of every arm is in ``benchmarks.alignment_arms``."""

    users: int = WORLD.users
    items: int = WORLD.items
    held: int = 300
    """Users who are judged and never learned from."""
    pretrain_steps: int = 640
    """Of 32 requests: about twice through the log; after one pass (V2) three of five free samples name nothing."""
    reward_steps: int = 160
    """Of 64 requests: about once."""

    def world(self, seed: int) -> SimulatorConfig:
        """The world of ``seed``."""
        return replace(WORLD, users=self.users, items=self.items, seed=seed)


Make = Callable[[int, Sizes], tuple[str, Simulator | UserModel]]
"""The world of a seed, and what its records are kept by."""


def simulated(seed: int, sizes: Sizes) -> tuple[str, Simulator]:
    """The published world."""
    config = sizes.world(seed)
    return world_hash(config), Simulator(config)


def fitted(folder: Path) -> Make:
    """Worlds of the most active users of the log in ``folder``, who respond as the user model fitted on it says."""
    dataset = load(folder)

    def make(seed: int, sizes: Sizes) -> tuple[str, UserModel]:
        config = UserModelConfig(users=sizes.users, drift_day=None, new_items_per_day=0, seed=seed)
        return f"{dataset.name} {seed}", UserModel.fit(dataset, config)

    return make


class Lab:
    """One seed's world with what was learned from its organic log; ``folder`` keeps what took long."""

    def __init__(self, seed: int, sizes: Sizes, output: Path, make: Make = simulated) -> None:
        self.seed, self.sizes = seed, sizes
        name, self.world = make(seed, sizes)
        self.of = {"world": name, "sizes": asdict(sizes)}
        self.folder = place(output, f"world-{seed}", self.of)
        self.dataset: Dataset = self.world.history()
        self.start_ms = int(self.world.start().timestamp() * 1000)
        order = np.random.default_rng([seed, 1]).permutation(len(self.world.population()))
        seen = set(pc.unique(self.dataset.exposures["user_id"]).to_pylist())
        names = [name for name in np.array(self.world.population())[order] if name in seen]
        self.held, self.people = sorted(names[: sizes.held]), sorted(names[sizes.held :])
        self.log = self.of_users(self.people)
        self._make()

    def of_users(self, users: Sequence[str]) -> pa.Table:
        """The organic exposures of ``users``."""
        mine = pc.is_in(self.dataset.exposures["user_id"], value_set=pa.array(users))
        return self.dataset.exposures.filter(mine)

    def _make(self) -> None:
        """Data, tokenizer, pre-trained model and reward model of the organic log, once."""

        def make(folder: Path) -> dict[str, Any]:
            print(f"seed {self.seed}: data and tokenizer", file=sys.stderr)
            write_log(self.dataset, self.log, self.folder / "data")
            tokenizer = Tokenizer.fit(self.dataset.items, self.log, TokenizerConfig(seed=self.seed))
            tokenizer.save(self.folder / "tokenizer.safetensors")
            return {"exposures": self.log.num_rows, "items": self.dataset.items.num_rows}

        self.record = kept(self.folder, "made", self.of, make)
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.safetensors")
        self.catalogue: Catalogue = self.tokenizer.catalogue(self.dataset.items, self.log)
        self.trie = Trie.from_sids(self.catalogue.sids)
        size = replace(preset("tiny", self.catalogue.codes, self.catalogue.levels), dropout=0.1)
        config = PretrainConfig(
            epochs=1000,
            batch_requests=32,
            max_steps=self.sizes.pretrain_steps,
            seed=self.seed,
            checkpoint_every=50,
            threads=1,
            **WEIGHTS,
        )
        self.pretraining = pretrain(
            self.data,
            self.catalogue,
            size,
            config,
            self.pretrained,
            code_vectors=self.tokenizer.codebooks,
            name="pretrained",
        )
        self.rewarding = self.learn_reward(self.data, self.folder / "reward")
        self.size = size

    @property
    def data(self) -> Path:
        """Training data of the organic log."""
        return self.folder / "data"

    @property
    def pretrained(self) -> Path:
        """The pre-trained weights' folder."""
        return self.folder / "pretrained"

    def learn_reward(self, data: Path, output: Path) -> dict[str, Any]:
        """A P-Score from the log in ``data``, at most two passes."""
        config = RewardConfig(
            epochs=2,
            batch_requests=64,
            max_steps=self.sizes.reward_steps,
            seed=self.seed,
            threads=1,
            least_auc=0.0,
            checkpoint_every=50,
        )
        return train_reward(data, self.catalogue, config, output, name=output.name)

    def reward(self, folder: Path | None = None) -> RewardModel:
        """The reward model of the organic log, or the one in ``folder``."""
        return load_reward((folder or self.folder / "reward") / REWARD, self.catalogue)

    def model(self, weights: Path | None = None) -> Generator:
        """The pre-trained policy, or the one whose weights lie in ``weights``."""
        return model_in(weights or self.pretrained, self.size)

    def recommender(self, model: Generator) -> Recommender:
        """Serves from ``model``."""
        return Recommender(unpublished(model, self.tokenizer, self.catalogue))

    def contexts(self, users: Sequence[str], log: pa.Table, times_ms: Sequence[int], name: str) -> Context:
        """What a server knows of ``users`` at these times."""
        return contexts_of(self.dataset, log, list(users), list(times_ms), self.catalogue, self.folder / "asked" / name)

    @cached_property
    def asked(self) -> Context:
        """The held-out users' contexts at one in the morning of day 0."""
        times = [self.start_ms + HOUR_MS] * len(self.held)
        return self.contexts(self.held, self.of_users(self.held), times, "held")

    @cached_property
    def seen(self) -> list[set[str]]:
        """What each held-out user has seen."""
        return seen_by(self.dataset.exposures, self.held)

    @cached_property
    def truth(self) -> np.ndarray:
        """``truth_of`` the held-out users."""
        return self.truth_of(self.held, self.seen)

    def truth_of(self, users: Sequence[str], seen: Sequence[set[str]]) -> np.ndarray:
        """float64 [U, items]: the true expected seconds of every item, -inf where it was seen; for the oracle."""
        seconds = self.world.expected_play_ms(list(users), list(self.catalogue.item_ids), 0) / 1000
        row = {item: number for number, item in enumerate(self.catalogue.item_ids)}
        for user, items in enumerate(seen):
            seconds[user, [row[item] for item in items]] = -np.inf
        return seconds

    def judge(self, lists: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """What the held-out users make of their lists, [held] each; raises ValueError for a seen or repeated item."""
        for user, items, before in zip(self.held, lists, self.seen, strict=True):
            if len(set(items)) < LIST or not before.isdisjoint(items):
                raise ValueError(f"the list of {user} must be {LIST} different items that {user} has not seen: {items}")
        return self.world.expected(self.held, [list(each) for each in lists], 0)


def seen_by(exposures: pa.Table, users: Sequence[str]) -> list[set[str]]:
    """Items that each of ``users`` was shown."""
    seen: dict[str, set[str]] = {user: set() for user in users}
    for user, item in zip(exposures["user_id"].to_pylist(), exposures["item_id"].to_pylist(), strict=True):
        if user in seen:
            seen[user].add(item)
    return list(seen.values())


def best(scores: np.ndarray, ids: Sequence[str], count: int = LIST) -> list[list[str]]:
    """The items of the ``count`` highest scores [users, items], best first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return [[ids[item] for item in row] for row in order]


def save_weights(model: Generator, folder: Path) -> None:
    """What ``Lab.model`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
