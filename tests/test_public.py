"""The shape of the house: public names, direction of imports, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eyechart
from eyechart import cli
from eyechart.models import DEFAULT_MODEL

SOURCE = Path(eyechart.__file__).parent

PUBLIC = {
    "EyechartError",
    "Probe",
    "Record",
    "attention_statistics",
    "capture",
    "collapse_curve",
    "collapse_study",
    "dispersion",
    "exam",
    "families",
    "head_census",
    "information_flow",
    "lenses",
    "load",
    "open_result",
    "precision_ladder",
    "rank_collapse",
    "residual_norms",
    "sequences",
    "targets",
}

# Each room may import from the rooms named; errors are open to all.
MAY_IMPORT = {
    "results": set(),
    "models": {"results"},
    "sequences": {"results", "models"},
    "targets": {"results", "sequences"},
    "kernels": {"models", "targets"},
    "probes": {"results", "models", "sequences", "kernels"},
    "precision": set(),
    "attempts": set(),
    "lenses": {"results", "models", "kernels", "probes", "precision"},
    "texts": set(),
    "families": {"sequences", "texts"},
    "prefixes": {"results", "sequences"},
    "flow": {"results", "models", "sequences", "kernels", "probes", "lenses"},
    "attention": {"results", "models", "sequences", "targets", "kernels", "probes"},
    "heads": {
        "results",
        "models",
        "sequences",
        "targets",
        "kernels",
        "probes",
        "attention",
        "texts",
    },
    "residual": {"results", "models", "sequences", "probes"},
    "collapse": {
        "attempts",
        "results",
        "models",
        "sequences",
        "kernels",
        "probes",
        "precision",
        "lenses",
        "texts",
        "families",
        "prefixes",
    },
    "examine": {
        "attempts",
        "results",
        "models",
        "sequences",
        "probes",
        "attention",
        "residual",
        "collapse",
        "flow",
    },
    "report": {"results"},
    "cli": {
        "results",
        "models",
        "sequences",
        "families",
        "precision",
        "examine",
        "flow",
        "heads",
        "collapse",
        "report",
    },
    "errors": set(),
}


def test_public_names():
    assert set(eyechart.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(eyechart, name) is not None
    assert set(dir(eyechart)) >= PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'telescope'"):
        _ = eyechart.telescope


def test_functions_are_not_shadowed_by_their_modules():
    import eyechart.examine
    import eyechart.probes.capture

    assert callable(eyechart.exam) and callable(eyechart.capture)


def imports(path: Path) -> set[str]:
    """Rooms of eyechart that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")
        names = []
        if isinstance(node, ast.ImportFrom):
            names = (
                [f"eyechart.{alias.name}" for alias in node.names]
                if node.module == "eyechart"
                else [node.module or ""]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("eyechart.")}
    return found


def test_imports_go_one_way():
    rooms = set()
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        rooms.add(room)
        assert imports(path) - {room, "errors"} <= MAY_IMPORT[room], path
    assert rooms == set(MAY_IMPORT)


def test_rooms_form_no_circle():
    order: list[str] = []
    left = dict(MAY_IMPORT)
    while left:
        ready = [room for room, needs in left.items() if needs <= set(order)]
        assert ready, f"circle among {sorted(left)}"
        order += ready
        left = {room: needs for room, needs in left.items() if room not in ready}


@pytest.mark.parametrize("command", ["import eyechart", "import eyechart.cli"])
def test_heavy_libraries_wait_until_they_are_needed(command):
    heavy = {"torch", "transformers", "transformer_lens", "plotly", "pandas", "numpy", "rich"}
    script = f"{command}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    allowed = {"rich"} if "cli" in command else set()  # typer's own
    assert not loaded & (heavy - allowed)


def test_the_default_shown_is_the_default():
    assert cli.DEFAULT_SHOWN == DEFAULT_MODEL
