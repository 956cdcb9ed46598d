"""Put an exam on one page."""

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from eyechart.report.attention_view import FULL_COLOUR, STEPS, attention_view, scripts
from eyechart.report.provenance import per_part, shared
from eyechart.report.security import content_policy, json_text, script_text
from eyechart.results import STATISTICS, Exam
from eyechart.results.figures import residual_map, visible

LONG_TEXT = 120
"""Texts with more tokens can be folded; all but the first are, so that the findings are near."""

MAP_TOKENS = 2048
"""Positions in the map of the residual stream; more would be below a pixel, and cost megabytes."""

MASSIVE_ROWS = 10


def render(exam: Exam) -> str:
    """The exam as one self-contained HTML page.

    The page needs no network and sends nothing anywhere; no token, name or message in the exam can
    run as script or become markup. The same exam gives the same page, byte for byte.
    """
    data = {
        "figures": {
            name: json.loads(str(figure.to_json()))
            for name, figure in _figures(exam).items()
            if figure is not None
        },
        "patterns": None,
    }
    view = None
    if exam.patterns is not None:
        view = attention_view(exam.patterns)
        data["patterns"] = {"props": view.props, "heads": view.heads, "steps": STEPS}
    sources = [get_plotlyjs(), *(scripts() if view is not None else ()), _resource("report.js")]
    inline = [script_text(source) for source in sources]
    return _template().render(
        exam=exam,
        summary=exam.summary(),
        heads=exam.attention.to_frame().to_dict("records") if exam.attention else [],
        statistics=STATISTICS,
        view=view,
        full_colour=FULL_COLOUR,
        massive=exam.residual.massive()[:MASSIVE_ROWS] if exam.residual else (),
        shared=shared(exam),
        per_part=per_part(exam),
        long_text=LONG_TEXT,
        map_tokens=MAP_TOKENS,
        policy=content_policy(inline),
        style=Markup(_resource("report.css")),
        scripts=inline,
        data=json_text(data),
    )


def _figures(exam: Exam) -> dict[str, go.Figure | None]:
    residual = exam.residual
    return {
        "attention": exam.attention and exam.attention.plot(),
        "residual": residual
        and residual_map(residual.norm[0], residual.sequences.labels[0][:MAP_TOKENS]),
        "collapse": exam.collapse and exam.collapse.plot(),
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {"visible": visible, "number": _number, "span": _span}
    environment.filters.update(filters)
    return environment.get_template("template.html.j2")


def _resource(name: str) -> str:
    return (resources.files("eyechart.report") / name).read_text(encoding="utf-8")


def _number(value: float, digits: int = 3) -> str:
    """Fixed decimals; a dash where there is no value (a layer without attention)."""
    return "–" if value != value else f"{value:.{digits}f}"


def _span(lengths: tuple[int, ...]) -> str:
    """``185``, or ``12 to 185`` where sequences differ in length."""
    low, high = min(lengths), max(lengths)
    return str(low) if low == high else f"{low} to {high}"
