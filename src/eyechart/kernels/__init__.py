"""Attention from queries, keys and values: the layer's output and the statistics of its rows."""

from eyechart.kernels.attend import attend, kernel_for
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.definitions import Reducer, seers

__all__ = ["AttentionCall", "Reducer", "attend", "kernel_for", "seers"]
