"""Saved views as wandb-workspaces makes them: a workspace, and a report that compares runs.

The package is optional (``pip install smda-callbacks[views]``). Specifications are built and checked without a server;
saving needs one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smda_callbacks.sinks.metrics import STEP
from smda_callbacks.sinks.wandb_views import Panel, Section

EXTRA = "views"


class ViewError(ValueError):
    """A saved view that cannot be made."""


@dataclass(frozen=True)
class Named:
    """A run as W&B names it. ``entity``: None where it is not known, as of an offline run."""

    entity: str | None
    project: str
    id: str


def workspace(name: str, runs: Sequence[Named], sections: Sequence[Section]) -> Any:
    """A workspace of ``wandb_workspaces.workspaces`` with the runs in it.

    Raises ViewError: not all runs are in one project, or the package is missing.
    """
    packages = _packages()
    entity, project = _one_project(runs)
    parts = [packages.ws.Section(name=each.title, is_open=True, panels=_panels(each.panels)) for each in sections]
    settings = packages.ws.WorkspaceSettings(x_axis=STEP, smoothing_weight=0, group_by_prefix="last")
    chosen = packages.ws.RunsetSettings(filters=_only(runs))
    return packages.ws.Workspace(
        entity=entity or "", project=project, name=name, sections=parts, settings=settings, runset_settings=chosen
    )


def report(title: str, runs: Sequence[Named], sections: Sequence[Section], compare: Panel, *, offline: bool) -> Any:
    """A report of ``wandb_workspaces.reports.v2``, a run set for every project; ``offline``: the server is not asked
    for the ids of projects, so that it can be printed but not saved. Raises ViewError as :func:`workspace`."""
    wr = _packages().wr
    run_sets = [_run_set(each, runs, offline) for each in dict.fromkeys((run.entity, run.project) for run in runs)]
    blocks: list[Any] = [wr.TableOfContents()]
    for number, each in enumerate(sections):
        panels = (*each.panels, compare) if not number and compare.names else each.panels
        blocks += [wr.H1(each.title), wr.P(each.text), wr.PanelGrid(runsets=run_sets, panels=_panels(panels))]
    blocks += [wr.H1("Settings"), wr.PanelGrid(runsets=run_sets, panels=[wr.RunComparer(diff_only="split")])]
    entity, project = runs[0].entity, runs[0].project
    where = entity or ("ENTITY" if offline else "")  # empty: the server's default is asked for
    return wr.Report(entity=where, project=project, title=title, width="fluid", blocks=blocks)


def specification(view: Any) -> dict[str, Any]:
    """The JSON that the server would be sent for a workspace or report, checked by the package's own model."""
    model = view._to_model()
    found: dict[str, Any] = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    if isinstance(found.get("spec"), str):
        found["spec"] = json.loads(found["spec"])
    return found


def save(view: Any) -> None:
    """Send a workspace or report to the server. Raises ViewError, whatever W&B raises."""
    try:
        view.save()
    except Exception as error:  # W&B raises errors of many kinds; the user can do the same about all of them
        raise ViewError(
            f"W&B did not take it ({type(error).__name__}: {error}). Next step: check wandb login and the names of "
            "entity and project; --dry-run prints what would be sent."
        ) from error


def _panels(panels: Sequence[Panel]) -> list[Any]:
    """The panels, two a row."""
    layout = _packages().wr.Layout
    found = [_panel(each) for each in panels]
    for number, each in enumerate(found):
        each.layout = layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8)
    return found


def _panel(panel: Panel) -> Any:
    wr = _packages().wr
    names = list(panel.names)
    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=names[0])
    if panel.kind == "table bars":
        assert panel.columns is not None
        label, value = panel.columns
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": names[0]}},
            chart_name="wandb/bar/v0",
            chart_fields={"label": label, "value": value},
            chart_strings={"title": panel.title},
        )
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=[wr.SummaryMetric(name) for name in names], orientation="h")
    if panel.kind == "parallel":
        column = wr.ParallelCoordinatesPlotColumn
        settings = [column(wr.Config(path), display_name=name) for path, name in panel.settings]
        return wr.ParallelCoordinatesPlot(
            title=panel.title, columns=[*settings, *(column(wr.SummaryMetric(name)) for name in names)]
        )
    style = "stacked-area" if panel.kind == "stack" else "line"
    return wr.LinePlot(title=panel.title, x=STEP, y=names, plot_type=style, smoothing_factor=0)


def _run_set(where: tuple[str | None, str], runs: Sequence[Named], offline: bool) -> Any:
    entity, project = where
    named = {} if offline else {"entity": entity or "", "project": project}
    chosen = [run for run in runs if (run.entity, run.project) == where]
    return _packages().wr.Runset(name=project, filters=_only(chosen), **named)


def _only(runs: Sequence[Named]) -> Any:
    expr = _packages().expr
    return expr.And(expr.Metric("ID").isin([run.id for run in runs]))


def _one_project(runs: Sequence[Named]) -> tuple[str | None, str]:
    found = list(dict.fromkeys((run.entity, run.project) for run in runs))
    if len(found) > 1:
        names = ", ".join("/".join(part for part in each if part) for each in found)
        raise ViewError(
            f"a workspace shows the runs of one project, these are of {names}. Next step: give runs of one project, or "
            "make a report, which takes several."
        )
    return found[0]


@dataclass(frozen=True)
class _Packages:
    wr: Any
    ws: Any
    expr: Any


def _packages() -> _Packages:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic 1's names, in the package's own code
            import wandb_workspaces.expr
            import wandb_workspaces.reports.v2
            import wandb_workspaces.workspaces
    except ImportError as error:
        raise ViewError(
            f"workspaces and reports need the package wandb-workspaces ({error}). Next step: "
            f'pip install "smda-callbacks[{EXTRA}]"'
        ) from error
    return _Packages(wandb_workspaces.reports.v2, wandb_workspaces.workspaces, wandb_workspaces.expr)
