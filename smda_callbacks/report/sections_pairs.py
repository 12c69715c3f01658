"""The sections on training pairs: what each did, and the ledger that their shares close."""

from __future__ import annotations

import numpy as np

from smda_callbacks.records import Array
from smda_callbacks.report import figures as f
from smda_callbacks.report import figures_pairs
from smda_callbacks.report import texts_pairs as texts
from smda_callbacks.report.data import RunData
from smda_callbacks.report.markup import Html, count, element, fixed, join, number, percent, table
from smda_callbacks.report.pair_ranking import MOST_COLUMNS, aligned, ranking_table
from smda_callbacks.report.pairs_data import (
    MOST_BARS,
    TERMS,
    PairData,
    above_noise,
    data_columns,
    ledger,
    moved_features,
    need_pairs,
    pair_name,
    thinned,
)
from smda_callbacks.report.ranking import unexplained_part, unit_of
from smda_callbacks.report.section import Page, chooser, feature_warning, say
from smda_callbacks.report.sections_rescore import influence_part
from smda_callbacks.report.shifts import shortened
from smda_callbacks.sinks.unattributed import unattributed_sentence

#: Pairs in the heat map and among the curves; functionals with a ledger; rows of its totals shown at once.
MAPPED, CURVED, LEDGERS, TOTALS = 30, 8, 12, 12

#: Pairs in the table of shares, by one functional and in all.
SHARED, MOST_SHARED = 20, 300


def pairs_section(page: Page) -> Html:
    """The ranking by effect, the heat map of effects, and the curves of shares."""
    data, pairs = page.data, need_pairs(page.data)
    noise = texts.UNFLOORED if pairs.table.floor is None else texts.FLOORED
    text = say(texts.EFFECT, noise=noise)
    if data.audit:
        repeats = int(data.store.manifest.get("audit", {}).get("repeats", 1))
        over = texts.REPEATS.format(repeats=repeats) if repeats > 1 else ""
        text = say(texts.EFFECT_AUDIT, noise=noise, repeats=over)
    limit = "" if pairs.table.floor is None else ", and above noise"
    kept_out = all(pair.text is None for pair in pairs.table.pairs)
    more = data_columns(pairs.table)[MOST_COLUMNS:]
    return join([
        element("p", _source(data, pairs)),
        text,
        say(texts.FLAGS + (f" {texts.TEXT_KEPT_OUT}" if kept_out else ""), limit=limit),
        say("Further columns of the data set are in tables/pairs.parquet: {names}.", names=", ".join(more)) if more
        else None,
        ranking_table(page.rankings, data, pairs, "effect"),
        feature_warning(data),
        page.for_behaviours(_map_of),
        None if data.audit else page.for_behaviours(_curves_of),
        influence_part(page),
    ])  # fmt: skip


def _source(data: RunData, pairs: PairData) -> str:
    """What was attributed, how, and what the run notes about it."""
    attribution, known = data.store.manifest["attribution"], int(pairs.table.known.sum())
    text = f"{count(known, 'pair')} with an account, of {len(pairs.table.pairs):,} seen."
    if not data.audit:
        text += f" Engine {attribution['engine']}: {attribution.get('why', '')}."
    notes = [str(note).rstrip(".") for note in attribution.get("notes", ())]
    left_out = unattributed_sentence(data.store.manifest, data.windows)
    return " ".join([text, *(f"{note[:1].upper()}{note[1:]}." for note in notes), *([left_out] if left_out else [])])


def _names(pairs: PairData, rows: list[int]) -> list[str]:
    """Names of pairs for figures: row and kind."""
    column = next(iter(data_columns(pairs.table)), None)
    found = []
    for row in rows:
        pair = pairs.table.pairs[row]
        value = pair.columns.get(column, "") if column else ""
        found.append(f.safe(" · ".join(filter(None, [pair_name(pair), shortened(value, 24)]))))
    return found


def _map_of(page: Page, m: int) -> Html:
    data, pairs = page.data, need_pairs(page.data)
    parts = pairs.parts(m, pairs.table.effect)
    title = element("h3", "Pairs × features")
    if not parts:
        return join([title, say(texts.NO_FEATURES)])
    above = above_noise(pairs.table)
    known = np.ones_like(pairs.table.effect, dtype=bool) if above is None else above
    shown = pairs.parts(m, known.astype(np.float64))
    visible = np.sum([(values * shown[part]) ** 2 for part, values in parts.items()], axis=(0, 2))
    if not visible.any():
        return join([title, say(texts.MAP_NONE)])
    rows = [int(row) for row in np.argsort(-visible, kind="stable")[:MAPPED] if visible[row] > 0]
    places = moved_features(pairs, m)
    cells = {part: values[rows][:, places] for part, values in parts.items()}
    masks = {part: values[rows][:, places] > 0 for part, values in shown.items()}
    found = figures_pairs.effect_map(data, _names(pairs, rows), cells, masks, pairs.table.features[places].tolist())
    blank = texts.UNFLOORED if above is None else texts.MAP_BLANK
    left = len(pairs.table.features) - len(places)
    blank += f" {count(left, 'feature')} that pairs moved less are left out." if left else ""
    return join([
        title,
        say(texts.MAP, pairs=len(rows), blank=blank, limit=number(found.layout.coloraxis.cmax)),
        page.figure(f"map-{m}", found, texts.MAP_CAPTION),
    ])  # fmt: skip


def _curves_of(page: Page, m: int) -> Html | None:
    data, pairs = page.data, need_pairs(page.data)
    options = [(each.name, pairs.place(each.name)) for each in pairs.groups(m)]
    if not options:
        return None
    for at, (_, place) in enumerate(options):
        sizes = np.abs(pairs.table.share[:, place])
        rows = [int(row) for row in np.argsort(-sizes, kind="stable")[:CURVED] if sizes[row] > 0]
        page.figures[f"curves-{m}-{at}"] = figures_pairs.share_curves(data, _names(pairs, rows), rows, place, data.unit)
    selects = {"functional": [(at, name) for at, (name, _) in enumerate(options)]}
    return join([
        element("h3", "Shares of the top pairs over steps"),
        say(texts.CURVES, pairs=min(CURVED, int(pairs.table.known.sum()))),
        chooser(page.figures, f"curves-{m}", selects, texts.CURVES_CAPTION),
    ])  # fmt: skip


def ledger_section(page: Page) -> Html:
    """How far the books explain what was measured: sentence, bars per window, totals, and shares by pair."""
    data, pairs = page.data, need_pairs(page.data)
    return join([
        element("p", attributed_sentence(data, pairs), class_="lead"),
        say(texts.LEDGER),
        page.for_behaviours(_ledger_of),
        element("h3", "Run totals"),
        say(texts.TOTALS),
        _totals(data, pairs),
        element("h3", "Shares of pairs"),
        say(texts.SHARES),
        ranking_table(page.rankings, data, pairs, "share", per=SHARED, most=MOST_SHARED),
    ])  # fmt: skip


def attributed_sentence(data: RunData, pairs: PairData) -> str:
    """How many windows were attributed, and what of their change is unexplained."""
    found, said = pairs.table, []
    for m in range(len(data.behaviours)):
        for each in pairs.groups(m):
            if not each.is_category:
                said.append(f"{percent(unexplained_part(found, each.name))} of {each.name}")
    parts = [unexplained_part(found, each.name) for each in pairs.shifts]
    known = [part for part in parts if part is not None]
    if known:
        said.append(f"{percent(float(np.median(known)))} of a coefficient's shift, in the median")
    text = f"{found.attributed:,} of {count(found.booked, 'booked window')} attributed to pairs."
    return f"{text} Unexplained of the change over them: {', '.join(said)}." if said else text


def _ledger_of(page: Page, m: int) -> Html | None:
    data, pairs = page.data, need_pairs(page.data)
    books = thinned(ledger(data))
    names = _ledger_names(pairs, m)
    if not names:
        return None
    for at, name in enumerate(names):
        unit = unit_of(pairs.table, data.policy, name)
        page.figures[f"ledger-{m}-{at}"] = figures_pairs.ledger_bars(data, books, pairs.place(name), unit)
    summed = len(books.steps) < pairs.table.attributed
    bars = f"Neighbouring windows are summed, so that there are at most {MOST_BARS} bars." if summed else ""
    selects = {"functional": [(at, name) for at, name in enumerate(names)]}
    return chooser(page.figures, f"ledger-{m}", selects, texts.LEDGER_CAPTION.format(bars=bars).rstrip())


def _ledger_names(pairs: PairData, m: int) -> list[str]:
    """Functionals with a ledger: the groups, then the shifts of coefficients that are largest."""
    groups = [each.name for each in pairs.groups(m)][:LEDGERS]
    shifts = [each.name for each in pairs.shifts if each.behaviour == m]
    measured = pairs.table.lines["measured"]
    shifts.sort(key=lambda name: -abs(float(measured[pairs.place(name)])))
    return groups + shifts[: LEDGERS - len(groups)]


def _totals(data: RunData, pairs: PairData) -> Html:
    """Run totals of every functional; groups of probes at once, the others folded away."""
    books = ledger(data)
    totals = {name: rows.sum(axis=0) for name, rows in books.terms.items()}
    names = [each.name for each in pairs.means if not each.converted]
    rest = [name for name in pairs.table.functionals if name not in names]
    rest.sort(key=lambda name: -abs(float(totals["measured"][pairs.place(name)])))
    first, rest = names[:TOTALS], names[TOTALS:] + rest
    listed = rest[: 10 * TOTALS]
    title = f"{count(len(rest), 'further functional')}"
    if len(listed) < len(rest):
        title += f"; the first {len(listed)} are listed, all are in tables/ledger.parquet"
    shown = _totals_table(pairs, first, totals)
    return join([shown, element("details", element("summary", title), _totals_table(pairs, listed, totals))
                 if rest else None])  # fmt: skip


def _totals_table(pairs: PairData, names: list[str], totals: dict[str, Array]) -> Html:
    head = ["functional", "measured", *TERMS, "unexplained %", "not attributed"]
    return table(head, [_totals_row(pairs, name, totals) for name in names], set(head[1:]))


def _totals_row(pairs: PairData, name: str, totals: dict[str, Array]) -> Html:
    place = pairs.place(name)
    values = [
        *(float(totals[term][place]) for term in ("measured", *TERMS)),
        float(pairs.table.lines["unattributed"][place]),
    ]
    *numbers, missing = aligned(np.array(values))
    part = unexplained_part(pairs.table, name)
    share = fixed(100 * part, 1) if part is not None else "–"
    cells = [element("td", each, class_="number") for each in (*numbers, share, missing)]
    return element("tr", element("th", name, scope="row", class_="tight"), *cells)
