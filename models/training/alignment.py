"""What alignment is: which objective, learned from what, how roll-outs are drawn and judged, and when it stops.

RSFT (OneRec V1, arXiv 2506.13695, 3.3) is always there: its next-token loss is the anchor in place of a KL term. Beside
it one policy objective learns from feedback on logged exposures (OneRec-V2, 2508.20900, 3.1), from roll-outs that a
reward model judges (V1 2.4), or from both. The loop is in ``models.training.on_policy``.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from models.objectives.grpo import ClipConfig
from models.rewards.industrial import Rule, parse_rules
from models.training.rollouts import DrawConfig, Mode
from models.training.stage import StageConfig

PREFERENCES = ("dpo", "s-dpo")
OBJECTIVES = ("rsft", "gbpo", "grpo", "ecpo", *PREFERENCES)
SIGNALS = ("exposures", "rollouts", "hybrid")
Worth = Literal["pscore", "stay"]


@dataclass(frozen=True, kw_only=True)
class AlignConfig(StageConfig):
    """Alignment; constants are ours where no paper is named."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """fp32, as the server computes the log-probabilities it logs: ratios compare the two."""
    checkpoint_every: int = 50
    objective: Literal["rsft", "gbpo", "grpo", "ecpo", "dpo", "s-dpo"] = "gbpo"
    """What is learned beside the next-token loss; ``rsft`` is that loss alone."""
    signal: Literal["exposures", "rollouts", "hybrid"] = "exposures"
    """From feedback on logged exposures (GBPO only), from roll-outs judged by the reward model, or from both."""
    policy_weight: float = 1.0
    """Loss = NTP on the kept sessions + this times the policy objective."""
    drop_sessions: float = 0.5
    """Share of sessions, those with the least play time, that RSFT leaves out (V1 3.3)."""
    top_share: float = 0.25
    """Share of exposures whose advantage is +1 (V2 3.1.1: the top quartile)."""
    own_share: float | None = None
    """Share of our own (source onerec) among the exposures that the policy learns from; the surplus of the others, or
    of ours, is left out at random. None takes them as they come."""
    worth: Worth = "pscore"
    """What a roll-out is worth: its P-Score (V1), or the seconds that it is predicted to be watched for (ours)."""
    model_share: float = 0.5
    """Of the hybrid signal: how much the judged roll-outs count, beside the feedback."""
    users_share: float = 0.01
    """Share of users, chosen by a hash, whose requests are rolled out (V1: 1 % of RSFT's)."""
    rollout_requests: int = 8
    """Requests rolled out in a step, over all workers."""
    group: int = 32
    """Roll-outs of a request; V1 has 512, about four times the items served. Server beams: at most 100."""
    learned: int = 0
    """How many of a group the policy learns from, the best and the worst of them (ours): all are judged and normalise
    each other, few are worth a backward pass. 0 = all."""
    search: Mode = "sample"
    """Groups are drawn, or are the best by beam search (V1 found beams better); DPO always takes beams."""
    push_every: int = 50
    """Steps between two pushes of weights to the sampler (V1: 1000)."""
    patience_s: float = 300.0
    """How long a roll-out server that is away is waited for before the training fails."""
    constrained: bool = True
    exclude_seen: bool = True
    temperature: float = 1.0
    format: Literal["none", "random", "top"] = "none"
    """Format reward on ``format_samples`` of a group, at random or the likeliest (V1 2.4.2); unconstrained draws."""
    format_samples: int = 5
    format_weight: float = 1.0
    rules: str = ""
    """Industrial rules: the TOML text of ``models.rewards.industrial``."""
    epsilon: float = 0.2
    delta: float = 0.1
    beta: float = 0.1
    losers: int = 4
    """Of ``s-dpo``: how many of the worst answers lose; ``dpo`` has one."""
    guard_drop: float = 0.2
    """Stop when held-out recall of the first code falls by more than this share of its value before."""
    guard_targets: int = 100
    """Below this many held-out targets there is no guard: it would react to noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_sessions < 1 or not 0 < self.guard_drop <= 1 or self.policy_weight <= 0:
            raise ValueError(
                f"drop_sessions {self.drop_sessions} must be in [0, 1), guard_drop {self.guard_drop} in (0, 1] and "
                f"policy_weight {self.policy_weight} above 0 (objective 'rsft' has no policy)"
            )
        self._check_choice()
        self._check_groups()
        self._check_shares()
        self.clip, self.industrial  # noqa: B018  both raise ValueError

    def _check_choice(self) -> None:
        known = self.objective in OBJECTIVES and self.signal in SIGNALS
        if self.worth not in get_args(Worth):
            raise ValueError(f"worth is {self.worth!r}; expected one of {', '.join(get_args(Worth))}")
        if not known or self.format not in ("none", "random", "top") or self.search not in ("sample", "beam"):
            raise ValueError(
                f"objective {self.objective!r} must be one of {', '.join(OBJECTIVES)}, signal {self.signal!r} one of "
                f"{', '.join(SIGNALS)}, format {self.format!r} none, random or top, search {self.search!r} sample or "
                "beam"
            )
        fits = {"rsft": self.signal == "exposures", "gbpo": True}
        if not fits.get(self.objective, self.rolls_out):
            raise ValueError(
                f"objective {self.objective!r} cannot learn from {self.signal!r}: 'rsft' learns from exposures alone, "
                "GRPO, ECPO and DPO compare the roll-outs of a group (signal 'rollouts' or 'hybrid')"
            )

    def _check_groups(self) -> None:
        least = 2 if self.objective not in PREFERENCES else self.losers_used + 1
        if self.rollout_requests < 1 or self.group < least or self.push_every < 1 or self.temperature <= 0:
            raise ValueError(
                f"rollout_requests {self.rollout_requests} and push_every {self.push_every} must be at least 1, group "
                f"{self.group} at least {least}, temperature {self.temperature} above 0"
            )
        if self.patience_s < 0:
            raise ValueError(f"patience_s is {self.patience_s}; it must be at least 0")
        if self.learned and (not least <= self.learned <= self.group or self.format != "none"):
            raise ValueError(
                f"learned is {self.learned}: give 0 or {least} .. group {self.group}, and 0 with a format reward "
                f"(format {self.format!r}), which judges draws whatever their reward"
            )
        if self.format == "none":
            return
        if self.constrained or self.mode == "beam" or not self.rolls_out:
            raise ValueError(
                f"format {self.format!r} rewards samples for naming an item: it needs roll-outs (signal "
                f"{self.signal!r}) that are drawn (search {self.mode!r}) and constrained false"
            )
        if not 1 <= self.format_samples <= self.group or self.format_weight < 0:
            raise ValueError(
                f"format_samples {self.format_samples} must be in 1 .. group {self.group} and format_weight "
                f"{self.format_weight} at least 0"
            )

    def _check_shares(self) -> None:
        shares = {"users_share": self.users_share, "model_share": self.model_share}
        shares |= {} if self.own_share is None else {"own_share": self.own_share}
        if wrong := [f"{name} {value}" for name, value in shares.items() if not 0 <= value <= 1]:
            raise ValueError(f"{', '.join(wrong)}: shares lie in [0, 1]")
        if self.beta <= 0 or self.losers < 1:
            raise ValueError(f"beta {self.beta} must be above 0 and losers {self.losers} at least 1")

    @property
    def rolls_out(self) -> bool:
        """Whether a sampler and a reward are needed."""
        return self.signal != "exposures"

    @property
    def mode(self) -> Mode:
        """How groups are made: preferences come from the beam (O1 Alg. 2, self-hard negatives)."""
        return "beam" if self.objective in PREFERENCES else self.search

    @property
    def losers_used(self) -> int:
        """Losers of a preference."""
        return self.losers if self.objective == "s-dpo" else 1

    @property
    def draw(self) -> DrawConfig:
        """How every sampler draws."""
        return DrawConfig(constrained=self.constrained, exclude_seen=self.exclude_seen, temperature=self.temperature)

    @property
    def clip(self) -> ClipConfig:
        """GRPO's and ECPO's bounds."""
        return ClipConfig(epsilon=self.epsilon, delta=self.delta)

    @property
    def industrial(self) -> tuple[Rule, ...]:
        """The industrial rules; raises ValueError saying which is wrong."""
        return parse_rules(self.rules, "align.rules")
