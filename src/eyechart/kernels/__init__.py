"""Attention from queries, keys and values: the layer's output and the statistics of its rows."""

from eyechart.kernels.attend import attend, kernel_for
from eyechart.kernels.call import AttentionCall
from eyechart.kernels.carry import carry
from eyechart.kernels.definitions import Reducer, seers
from eyechart.kernels.differentiable import differentiable
from eyechart.kernels.replaced import Replacement, replacements
from eyechart.kernels.streamed import blocks
from eyechart.kernels.tree import Tree

__all__ = [
    "AttentionCall",
    "Reducer",
    "Replacement",
    "Tree",
    "attend",
    "blocks",
    "carry",
    "differentiable",
    "kernel_for",
    "replacements",
    "seers",
]
