"""Representational collapse: what two prompts that differ by little still differ in."""

from eyechart.collapse.curve import DEFAULT_PROMPT, collapse_curve, distances

__all__ = ["DEFAULT_PROMPT", "collapse_curve", "distances"]
