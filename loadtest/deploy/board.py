"""Makes Grafana's board from the panels, with Grafana's own typed SDK."""

from __future__ import annotations

import itertools

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from loadtest.deploy.panels import ROWS, Kind, Panel

UID, SOURCE_UID = "pareto", "prometheus"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_HEIGHT, _WIDTH = 8, 6


def board_json() -> str:
    """Return the board as JSON that Grafana reads, the same for the same panels."""
    board = (
        dashboard.Dashboard("vllm-pareto: server and load test")
        .uid(UID)
        .description("Made by python -m loadtest.deploy; docs/watching.md says what the panels mean.")
        .tags(["vllm", "vllm-pareto", "load test"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(_choice("instance", "Server", "label_values(vllm:num_requests_running, instance)"))
        .with_variable(_choice("run", "Load test", "label_values(pareto_loadtest_requests_total, run)"))
    )
    numbers = itertools.count(1)
    for title, panels in ROWS.items():
        board.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            board.with_panel(_panel(panel).id(next(numbers)))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_DESC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel:
    made = _lines() if panel.kind is Kind.LINES else _stat(panel.kind)
    made.title(panel.title).description(panel.text).datasource(_SOURCE).unit(panel.unit).min(0).span(_WIDTH)
    for place, query in enumerate(panel.queries):
        made.with_target(
            prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + place)).range()
        )
    return made


def _lines() -> timeseries.Panel:
    dashed = DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 6]})
    return (
        timeseries.Panel()
        .height(_HEIGHT)
        .fill_opacity(0)
        # Client and server mostly lie on each other.
        .override_by_regexp("/^server /", [dashed])
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )


def _stat(kind: Kind) -> stat.Panel:
    mode = BigValueTextMode.NAME if kind is Kind.NAMES else BigValueTextMode.VALUE_AND_NAME
    return (
        stat.Panel()
        .height(_HEIGHT // 2)
        .graph_mode(BigValueGraphMode.NONE)
        .text_mode(mode)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
