"""Where a result came from: versions, weights, tokens, cost."""

import datetime
import importlib.metadata
import platform
import sys
import time
from types import TracebackType
from typing import Self

import torch

import eyechart
from eyechart.models.facts import ModelFacts
from eyechart.results.base import Provenance
from eyechart.results.sequences import Sequences


class Meter:
    """Wall time and peak memory of a with-block."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device) if device.startswith("cuda") else None
        self.seconds = 0.0
        self.peak_bytes: int | None = None

    def __enter__(self) -> Self:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._cuda is not None and error is None:
            torch.cuda.synchronize(self._cuda)
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = (
            _peak_resident() if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)
        )


def provenance_of(
    facts: ModelFacts,
    sequences: Sequences,
    meter: Meter,
    *,
    attention: str,
    hooks: dict[str, int],
    passes: int,
    seed: int | None,
    notes: tuple[str, ...] = (),
) -> Provenance:
    """The provenance of a measurement that ``meter`` has timed."""
    return Provenance(
        versions=versions(),
        model=facts.name,
        weights=facts.weights,
        dtype=str(facts.dtype).removeprefix("torch."),
        device=facts.device,
        attention=attention,
        tokens=sequences.digest,
        seed=seed,
        hooks=hooks,
        forward_passes=passes,
        wall_seconds=round(meter.seconds, 4),
        peak_bytes=meter.peak_bytes,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=notes,
    )


def versions() -> dict[str, str]:
    """Versions of everything a number can depend on."""
    libraries = ("torch", "transformers", "transformer-lens")
    return {
        "eyechart": eyechart.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def _peak_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such call
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
