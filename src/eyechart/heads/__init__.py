"""Heads that do nothing: found by what they look at, proved by replacing them, priced."""

from eyechart.heads.census import head_census

__all__ = ["head_census"]
