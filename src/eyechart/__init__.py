"""An eye exam for transformers.

The names below are imported on first use, so that ``import eyechart`` and ``eyechart --help`` do
not pay for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eyechart import families as families
    from eyechart import lenses as lenses
    from eyechart import sequences as sequences
    from eyechart import targets as targets
    from eyechart.attention import attention_statistics as attention_statistics
    from eyechart.collapse import collapse_curve as collapse_curve
    from eyechart.collapse import collapse_study as collapse_study
    from eyechart.collapse import dispersion as dispersion
    from eyechart.collapse import precision_ladder as precision_ladder
    from eyechart.collapse import rank_collapse as rank_collapse
    from eyechart.errors import EyechartError as EyechartError
    from eyechart.examine import exam as exam
    from eyechart.flow import information_flow as information_flow
    from eyechart.heads import head_census as head_census
    from eyechart.models import load as load
    from eyechart.probes import Probe as Probe
    from eyechart.probes import Record as Record
    from eyechart.probes import capture as capture
    from eyechart.residual import residual_norms as residual_norms
    from eyechart.results import open_result as open_result

_HOME = {
    "load": "eyechart.models",
    "capture": "eyechart.probes",
    "Probe": "eyechart.probes",
    "Record": "eyechart.probes",
    "attention_statistics": "eyechart.attention",
    "residual_norms": "eyechart.residual",
    "collapse_curve": "eyechart.collapse",
    "collapse_study": "eyechart.collapse",
    "dispersion": "eyechart.collapse",
    "precision_ladder": "eyechart.collapse",
    "rank_collapse": "eyechart.collapse",
    "exam": "eyechart.examine",
    "head_census": "eyechart.heads",
    "information_flow": "eyechart.flow",
    "open_result": "eyechart.results",
    "EyechartError": "eyechart.errors",
}
_MODULES = ("families", "lenses", "sequences", "targets")

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"eyechart.{name}")
    else:
        raise AttributeError(f"module 'eyechart' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
