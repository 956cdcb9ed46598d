"""How an exam and its parts came to be, as rows of text."""

from eyechart.results import Exam, Provenance

_PARTS = {
    "attention": "every head",
    "patterns": "striking heads",
    "residual": "residual stream",
    "collapse": "collapse",
    "flow": "information flow",
    "heads": "census of heads",
    "collapse_study": "study of collapse",
}


def shared(exam: Exam) -> list[tuple[str, str]]:
    """What holds for every part, as ``(name, value)``."""
    whole = _rows(exam.provenance)
    parts = [_rows(provenance) for _, provenance in _parts(exam)]
    return [(name, value) for name, value in whole.items() if all(p[name] == value for p in parts)]


def per_part(exam: Exam) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What differs: the parts' names, and rows of one value a part, the whole exam first."""
    same = {name for name, _ in shared(exam)}
    whole = _rows(exam.provenance)
    parts = _parts(exam)
    rows = [
        (name, [value, *(_rows(provenance)[name] for _, provenance in parts)])
        for name, value in whole.items()
        if name not in same
    ]
    return ["whole exam", *(name for name, _ in parts)], rows


def _parts(exam: Exam) -> list[tuple[str, Provenance]]:
    return [
        (name, part.provenance)
        for field, name in _PARTS.items()
        if (part := getattr(exam, field)) is not None
    ]


def _rows(provenance: Provenance) -> dict[str, str]:
    peak = provenance.peak_bytes
    return {
        "model": provenance.model,
        "weights, SHA-256": provenance.weights,
        "number format": provenance.dtype,
        "device": provenance.device,
        "attention computed by": provenance.attention,
        "versions": ", ".join(f"{name} {value}" for name, value in provenance.versions.items()),
        "seed": "none, nothing was random" if provenance.seed is None else str(provenance.seed),
        "tokens, SHA-256": provenance.tokens,
        "hooks fired": ", ".join(f"{kind} × {count}" for kind, count in provenance.hooks.items()),
        "forward passes": str(provenance.forward_passes),
        "wall time": f"{provenance.wall_seconds:.3g} s",
        "peak memory": "not known" if peak is None else f"{peak / 2**20:,.0f} MiB",
        "measured (UTC)": provenance.created,
        "notes": "; ".join(provenance.notes) or "none",
    }
