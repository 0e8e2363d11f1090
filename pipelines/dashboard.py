"""The platform on one terminal page: services, models, runs, drift, gate, canary and intake, as they are now.

Everything comes from where monitoring reads it too (``monitoring.state``, ``.trigger``, ``.trial``); what cannot be
read now says so and does not hide the rest. Left out: graphs over time, which the daily report and Grafana have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from features.storage import Storage, StorageUnavailable
from monitoring import trial, trigger
from monitoring.state import OUTCOMES, Runs, State, read_state
from pipelines.stack import Health, ServedModel

COLOURS = {"healthy": "green", "unhealthy": "yellow", "dead": "red", "drift": "yellow", "stable": "green"}
LOOK_BACK_DAYS = 7
DECISIONS = 3
NEAREST = 3
"""How many drift columns are shown: those nearest to their thresholds."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Where the loop stands; ``missing`` says why nothing is known."""

    state: State = field(default_factory=State)
    decisions: Sequence[Mapping[str, Any]] = ()
    """The trigger's newest, the newest last."""
    canary: trial.Trial | None = None
    missing: str = ""

    def told(self) -> dict[str, Any]:
        """The same for machines."""
        state = self.state
        return {
            "missing": self.missing,
            "run": {"id": state.newest.run_id, "open": state.open} if state.newest else None,
            "finished": dict(state.finished),
            "drift": {"verdict": state.drift.get("verdict"), "reason": state.drift.get("reason")},
            "blessed": state.blessed,
            "aliases": dict(state.aliases),
            "impressions_until": state.impressions_until,
            "decisions": [{key: each.get(key) for key in _DECIDED} for each in self.decisions],
            "canary": vars(self.canary) | {"config": vars(self.canary.config)} if self.canary else None,
        }


_DECIDED = ("run_id", "window_end", "retrain", "reason")


def read_loop(storage: Storage, runs: Runs | None = None, now: datetime | None = None) -> Loop:
    """The loop as object storage tells it; while that is away, what is missing and why."""
    now = now or datetime.now(UTC)
    try:
        state = read_state(storage, now, runs)
        # The log's own time: a replayed one ended long ago.
        until = max((each for each in (state.impressions_until, _data_until(state)) if each), default=now)
        made = list(trigger.decisions(storage, max(until, now), LOOK_BACK_DAYS)) or list(
            trigger.decisions(storage, until, LOOK_BACK_DAYS)
        )
        return Loop(state=state, decisions=made[-DECISIONS:], canary=trial.read(storage))
    except StorageUnavailable as error:
        return Loop(missing=str(error.args[0]))
    except (KeyError, TypeError, ValueError) as error:
        return Loop(missing=f"a stored record cannot be read ({type(error).__name__}: {error}); see `onerec runs`")


def _data_until(state: State) -> datetime | None:
    times = [datetime.fromisoformat(each["data_time"]) for each in state.aliases.values() if each.get("data_time")]
    return max(times, default=None)


def render(services: Sequence[Health], models: Mapping[str, ServedModel], loop: Loop) -> RenderableType:
    """The page."""
    parts: list[RenderableType] = [_services(services)]
    parts += [_model(name, model) for name, model in models.items()]
    if loop.missing:
        parts.append(Text.from_markup(f"[yellow]loop: {escape(loop.missing)}[/]"))
    else:
        parts.append(_loop(loop))
    for row in services:
        if row.state != "healthy":
            advice = f"{row.service} is {row.state}: see `onerec logs {row.service}`; `onerec up` starts what is dead"
            parts.append(Text(advice))
    return Group(*parts)


def _services(rows: Sequence[Health]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("service", "state", "address"):
        table.add_column(column)
    for column in ("pid", "uptime", "memory"):
        table.add_column(column, justify="right")
    for row in rows:
        memory = f"{row.memory_bytes / 2**20:.0f} MB" if row.memory_bytes else "-"
        table.add_row(row.service, _coloured(row.state), row.address, str(row.pid), lasting(row.uptime_s), memory)
    return table


def _model(name: str, model: ServedModel) -> Text:
    state = f"[green]ready[/], {model.version}" if model.ready else "[yellow]not ready[/]"
    reason = f"\n  [yellow]{escape(model.reason)}[/]" if model.reason else ""
    return Text.from_markup(f"model {escape(name)}: {state} (alias {escape(model.alias)}){reason}")


def _loop(loop: Loop) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(loop):
        table.add_row(name, Text.from_markup(text))
    return table


def _lines(loop: Loop) -> list[tuple[str, str]]:
    """(heading, markup) of each line; a line is left out where nothing is known."""
    state, found = loop.state, []
    for alias, about in sorted(state.aliases.items()):
        until = f", learned until {about['data_time'][:16]}" if about.get("data_time") else ""
        found.append((f"alias {alias}", escape(f"{about['version']}, since {str(about['set_at'])[:16]}{until}")))
    if state.newest is not None:
        last = max(((state.finished[name], name) for name in OUTCOMES if name in state.finished), default=None)
        ended = f"; last ended {last[1]} at {last[0]:%Y-%m-%d %H:%M}" if last else ""
        under_way = "under way" if state.open else "ended"
        progress = f"{state.newest.progress:%Y-%m-%d %H:%M}"
        found.append(("newest run", escape(f"{state.newest.run_id}: {under_way}, stored last at {progress}{ended}")))
    if state.drift:
        found.append(("drift", f"{_coloured(state.drift['verdict'])}: {escape(_drift(state.drift))}"))
    for made in loop.decisions:
        word = "retrain" if made.get("retrain") else "no retraining"
        found.append(("trigger", escape(f"{made['window_end'][:16]} {word}: {made.get('reason', 'being decided')}")))
    if state.blessed is not None:
        recall = (state.evaluation.get("candidate") or {}).get("recall@50")
        beside = (state.evaluation.get("production") or {}).get("recall@50")
        figures = f", recall@50 {recall:.3f}" if recall is not None else ""
        figures += f" against {beside:.3f}" if beside is not None else ""
        found.append(("gate", ("[green]blessed[/]" if state.blessed else "[yellow]refused[/]") + figures))
    if loop.canary is not None:
        told = f"{loop.canary.version} on {loop.canary.config.share:.0%} of the {loop.canary.unit}s"
        looks = f"{len(loop.canary.looks)} of {loop.canary.config.looks} looks"
        found.append(("canary", escape(f"{told} since {loop.canary.started[:16]}, {looks}")))
    newest = state.impressions_until
    told = f"impressions until {newest:%Y-%m-%d %H:%M}" if newest else "no impression of the last days"
    found.append(("intake", told))
    return found


def _drift(summary: Mapping[str, Any]) -> str:
    columns = summary.get("columns") or {}
    near = sorted(columns.items(), key=lambda each: -each[1]["score"] / each[1]["threshold"])[:NEAREST]
    shares = ", ".join(f"{name} {about['score'] / about['threshold']:.0%}" for name, about in near)
    return f"{summary['reason']}{f' (of their thresholds: {shares})' if shares else ''}"


def _coloured(state: str) -> str:
    return f"[{COLOURS.get(state, 'yellow')}]{state}[/]"


def lasting(seconds: float) -> str:
    """A duration in words as short as they can be."""
    if seconds <= 0:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{seconds:.0f} s" if minutes < 1 else f"{minutes} min" if hours < 1 else f"{hours} h {minutes % 60} min"
