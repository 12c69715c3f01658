"""One self-contained HTML page about a run. It loads nothing: what it needs is inside, and the browser is told so."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from smda_callbacks.report.data import RunData
from smda_callbacks.report.figures import DARK
from smda_callbacks.report.markup import Html, element, join, script_json
from smda_callbacks.report.section import Page, Section
from smda_callbacks.report.sections import sections_of
from smda_callbacks.sinks.files import write_atomic
from smda_callbacks.sinks.store_reader import RunStore


def write_report(run: RunStore | str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not, and return where it lies.

    Args:
        run: a run store, or the folder of one.
        out: the HTML file to write; ``report.html`` in the folder of the run if not given. An old one is replaced.

    Raises:
        StoreError: the folder is not a run store, or a file of it is damaged.
        ValueError: ``out`` is a folder.
    """
    store = run if isinstance(run, RunStore) else RunStore.open(run)
    path = store.path / "report.html" if out is None else Path(out)
    if path.is_dir():
        raise ValueError(f"out is {str(path)!r}, a folder; the report is one file. Pass {str(path / 'report.html')!r}.")
    html = render(RunData.read(store))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html.encode("utf-8", "replace"))
    return path


def render(data: RunData) -> str:
    """The whole page as text. The same run gives the same text."""
    page, sections = Page(data), sections_of(data)
    body = [element("section", element("h2", _title(each, data)), each.build(page), id=each.name) for each in sections]
    title = f"{data.store.manifest.get('run_id', data.store.path.name)}: {_what(data).lower()}"
    return document(title, _bar(data, sections), body, page.figures, page.rankings)


def document(
    title: str,
    bar: Html,
    sections: Sequence[Html],
    figures: Mapping[str, go.Figure],
    rankings: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """A self-contained page: the bar on top, sections, and what its script draws (see section.Page)."""
    scripts = [Html(get_plotlyjs()), _asset("page.js")]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", _asset("page.css")),
    )
    content = [bar, element("main", *sections), _figures(figures, rankings or {})]
    content += [element("script", each) for each in scripts]
    return f"<!doctype html>\n{element('html', head, element('body', *content), lang='en')}\n"


def _what(data: RunData) -> str:
    return "What the pairs do" if data.audit else "What the run did"


def _title(section: Section, data: RunData) -> str:
    return _what(data) if section.name == "summary" else section.title


def _policy(scripts: list[Html]) -> str:
    """A content security policy: nothing is fetched, and no scripts run but these."""
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"


def _bar(data: RunData, sections: Sequence[Section]) -> Html:
    """The bar on top: where to go, which behaviour, which theme."""
    return navigation([(each.name, each.short) for each in sections], data.behaviours)


def navigation(places: Iterable[tuple[str, str]], behaviours: Sequence[str]) -> Html:
    """The bar on top, of ``places`` (anchor, title)."""
    links = [element("a", title, href=f"#{name}") for name, title in places]
    options = [element("option", name, value=number) for number, name in enumerate(behaviours)]
    chooser = element("label", "behaviour ", element("select", *options, id="chosen-behaviour"))
    button = element("button", "dark / light", id="theme", type="button", title="Switch between dark and light")
    return element("nav", *links, element("span", class_="space"), chooser if len(options) > 1 else None, button)


def _figures(found: Mapping[str, go.Figure], rankings: Mapping[str, Sequence[Mapping[str, Any]]]) -> Html:
    """All figures as one block of data, drawn when they come into view, and the rankings of pairs."""
    figures = {key: _plain(each) for key, each in found.items()}
    content = {"dark": DARK, "figures": figures, "rankings": rankings}
    noscript = element("noscript", "The figures need JavaScript; the tables do not.")
    return join([noscript, element("script", script_json(content), type="application/json", id="figures")])


def _plain(found: go.Figure) -> Any:
    return json.loads(json.dumps(found.to_plotly_json(), cls=PlotlyJSONEncoder))


def _asset(name: str) -> Html:
    return Html((package_files("smda_callbacks.report") / "assets" / name).read_text(encoding="utf-8"))
