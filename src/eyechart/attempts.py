"""Parts of a measurement, tried one by one: what fails is told and costs the others nothing."""

from collections.abc import Callable
from typing import TypeVar

from eyechart.errors import EyechartError

T = TypeVar("T")


class Attempts:
    """Runs parts and keeps what became of those that failed.

    Args:
        on_step: Called with the name of each part as it begins.

    Attributes:
        failures: What went wrong and what to do, by the name of the part.
    """

    def __init__(self, on_step: Callable[[str], object]) -> None:
        self.on_step, self.failures = on_step, dict[str, str]()

    def __call__(self, part: str, run: Callable[[], T]) -> T | None:
        """What ``run`` returns, None where it fails."""
        self.on_step(part)
        try:
            return run()
        except (EyechartError, RuntimeError, MemoryError) as problem:
            self.failures[part] = str(problem) or type(problem).__name__
            return None
