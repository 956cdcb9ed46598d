"""Put an exam, or one of its parts that is a study of its own, on one page."""

import json
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from eyechart.report.attention_view import FULL_COLOUR, STEPS, attention_view, scripts
from eyechart.report.census_view import census_figures, census_view
from eyechart.report.collapse_view import (
    collapse_figures,
    collapse_view,
    curve_figure,
    family_figures,
    family_view,
)
from eyechart.report.flow_view import flow_figures, flow_maps, flow_view
from eyechart.report.provenance import per_part, shared
from eyechart.report.security import content_policy, json_text, script_text
from eyechart.results import STATISTICS, CollapseStudy, Exam, HeadCensus, InformationFlow
from eyechart.results.figures import residual_map, visible
from eyechart.results.head_figures import FOLLOWING

LONG_TEXT = 120
"""Texts with more tokens can be folded; all but the first are, so that the findings are near."""

MAP_TOKENS = 2048
"""Positions in the map of the residual stream; more would be below a pixel, and cost megabytes."""

MASSIVE_ROWS = 10

FOLDED_TEXTS = 3
"""So many texts or more are folded too, however short."""

Shown = Exam | InformationFlow | HeadCensus | CollapseStudy
"""What a report can be made of."""


class Section(NamedTuple):
    """A section that shows one part of an exam.

    Attributes:
        title: Its heading.
        part: The part's name in :class:`Exam`.
        steps: The steps whose failure leaves it empty. Where none has failed and the part is not
            there, it was not asked for, and the section is left out.
    """

    title: str
    part: str
    steps: tuple[str, ...]


SECTIONS = {
    "heads": Section("Every head", "attention", ("attention",)),
    "striking": Section("The most striking heads", "patterns", ("patterns", "attention")),
    "residual": Section("The residual stream", "residual", ("residual",)),
    "collapse": Section("Collapse", "collapse", ("collapse",)),
    "study": Section("How representations collapse", "collapse_study", ()),
    "flow": Section("Where information comes from", "flow", ("information flow",)),
    "census": Section("What every head is for", "heads", ("head census",)),
}


def render(result: Shown) -> str:
    """The result as one self-contained HTML page.

    The page needs no network and sends nothing anywhere; no token, name or message in the exam can
    run as script or become markup. The same result gives the same page, byte for byte.
    """
    exam = _as_exam(result)
    data = {
        "figures": _json(_figures(exam)),
        "choices": _choices(exam),
        "patterns": None,
        "census": None,
    }
    summary, view = exam.summary(), None
    if exam.patterns is not None:
        view = attention_view(exam.patterns)
        data["patterns"] = {"props": view.props, "heads": view.heads, "steps": STEPS}
    census = exam.heads and census_view(exam.heads)
    if census is not None:
        data["census"] = census.patterns
    attention = scripts() if data["patterns"] or data["census"] else ()
    sources = [get_plotlyjs(), *attention, _resource("report.js")]
    inline = [script_text(source) for source in sources]
    return _template().render(
        exam=exam,
        sections={
            name: section.title
            for name, section in SECTIONS.items()
            if getattr(exam, section.part) is not None or exam.failures.keys() & set(section.steps)
        },
        summary=summary,
        heads=exam.attention.to_frame().to_dict("records") if exam.attention else [],
        statistics=STATISTICS,
        view=view,
        flow=exam.flow and flow_view(exam.flow),
        census=census,
        repeated=exam.collapse and family_view(exam.collapse),
        collapse=exam.collapse_study
        and collapse_view(exam.collapse_study, summary["collapse_study"]),
        domains=_domains(exam),
        following=FOLLOWING,
        full_colour=FULL_COLOUR,
        massive=exam.residual.massive()[:MASSIVE_ROWS] if exam.residual else (),
        shared=shared(exam),
        per_part=per_part(exam),
        long_text=LONG_TEXT,
        folded_texts=FOLDED_TEXTS,
        map_tokens=MAP_TOKENS,
        policy=content_policy(inline),
        style=Markup(_resource("report.css")),
        scripts=inline,
        data=json_text(data),
    )


def _as_exam(result: Shown) -> Exam:
    if isinstance(result, InformationFlow):
        return Exam.of_flow(result)
    if isinstance(result, HeadCensus):
        return Exam.of_heads(result)
    return Exam.of_collapse(result) if isinstance(result, CollapseStudy) else result


def _domains(exam: Exam) -> tuple[str, ...]:
    """Of each text of the page, where it is the census that was taken on them."""
    census = exam.heads
    if census is None or census.sequences.digest != exam.sequences.digest:
        return ()
    return census.names.domains


def _figures(exam: Exam) -> dict[str, go.Figure]:
    residual = exam.residual
    found = {
        "attention": exam.attention and exam.attention.plot(),
        "residual": residual
        and residual_map(residual.norm[0], residual.sequences.labels[0][:MAP_TOKENS]),
        "collapse": exam.collapse and curve_figure(exam.collapse),
        **(flow_figures(exam.flow) if exam.flow else {}),
        **(census_figures(exam.heads) if exam.heads else {}),
        **(collapse_figures(exam.collapse_study) if exam.collapse_study else {}),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _choices(exam: Exam) -> dict[str, dict[str, Any]]:
    """Figures that share places, by what chooses among them and the name of the choice."""
    found: dict[str, dict[str, dict[str, go.Figure]]] = {}
    if exam.flow and (maps := flow_maps(exam.flow)):
        found["map"] = maps
    if exam.collapse_study:
        found["family"] = family_figures(exam.collapse_study)
    return {
        name: {choice: _json(figures) for choice, figures in options.items()}
        for name, options in found.items()
    }


def _json(figures: dict[str, go.Figure]) -> dict[str, Any]:
    return {name: json.loads(str(figure.to_json())) for name, figure in figures.items()}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "visible": visible,
        "number": _number,
        "short": _short,
        "span": _span,
    }
    environment.filters.update(filters)
    return environment.get_template("template.html.j2")


def _resource(name: str) -> str:
    return (resources.files("eyechart.report") / name).read_text(encoding="utf-8")


def _number(value: float, digits: int = 3) -> str:
    """Fixed decimals; a dash where there is no value (a layer without attention)."""
    return "–" if value != value else f"{value:.{digits}f}"


def _short(value: float) -> str:
    """Two significant digits; a dash where there is no value."""
    return "–" if value != value else f"{value:#.2g}".rstrip(".")


def _span(lengths: tuple[int, ...]) -> str:
    """``185``, or ``12 to 185`` where sequences differ in length."""
    low, high = min(lengths), max(lengths)
    return str(low) if low == high else f"{low} to {high}"
