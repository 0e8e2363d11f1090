"""The few kinds of panel that the dashboards are made of, and the dashboard they stand on.

Built with grafana-foundation-sdk, whose types are Grafana's own. The data source is a variable: one file fits every
Grafana that has a Prometheus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = {"timeseries": 8, "stat": 4}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """``queries`` are (expression, legend); ``width`` in Grafana's 24 columns."""

    title: str
    about: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    width: int = 8
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False

    def build(self) -> Any:
        """The SDK's builder of the panel."""
        kind = timeseries.Panel() if self.kind == "timeseries" else stat.Panel()
        panel: Any = kind.title(self.title).description(self.about).datasource(SOURCE).unit(self.unit)
        panel = panel.span(self.width).height(HEIGHT[self.kind]).min(0)
        for number, (expression, legend) in enumerate(self.queries):
            query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
            panel = panel.with_target(query.datasource(SOURCE))
        if self.kind == "timeseries" and self.stacked:
            mode = common.StackingConfig().mode(common_models.StackingMode.NORMAL)
            panel = panel.stacking(mode).fill_opacity(30)
        return panel


def number(title: str, about: str, expression: str, unit: str = "short") -> Panel:
    """One number of now."""
    return Panel(title=title, about=about, queries=[(expression, "")], unit=unit, width=6, kind="stat")


def board(name: str, title: str, about: str, rows: Sequence[tuple[str, Sequence[Panel]]], since: str = "now-6h") -> Any:
    """The dashboard ``onerec-<name>`` with titled rows of panels."""
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    built = dashboard.Dashboard(title).uid(f"onerec-{name}").description(about).tags(["onerec"]).readonly()
    built = built.time(since, "now").refresh("1m").timezone("utc").with_variable(source)
    for heading, panels in rows:
        built = built.with_row(dashboard.Row(heading))
        for panel in panels:
            built = built.with_panel(panel.build())
    return built.build()


def text(built: Any) -> str:
    """The dashboard as the JSON that Grafana imports."""
    return str(JSONEncoder(sort_keys=True, indent=1).encode(built)) + "\n"
