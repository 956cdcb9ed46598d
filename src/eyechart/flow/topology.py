"""What follows from the shape of causal attention alone, and from matrices of it.

Causal attention matrices are lower triangular and row-stochastic. Products of them stay so, the
first token keeps all of its own mass, and everyone else loses some to it in every layer: whatever
the weights, depth drives information toward the start (Barbero et al., arXiv 2406.04267, section 5
and Lemmas B.6 to B.8; Wu et al., arXiv 2502.01951, Theorem 4.1).
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor


def path_counts(length: int, layers: int) -> list[int]:
    """Causal paths from each position to the last through all layers, exactly.

    A path stays or moves on in every layer: binomial(n - i + L - 1, L - 1) of them start at
    position i of 1..n. The last position has one.
    """
    return [math.comb(length - i + layers - 1, layers - 1) for i in range(1, length + 1)]


def layer_matrix(
    attention: Float[Tensor, "*batch query key"],
) -> Float[Tensor, "*batch query key"]:
    """(A + I) / 2: half of what a token hears is itself, by way of the residual stream."""
    eye = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    return (attention + eye) / 2


def deep_limit(attention: Float[Tensor, "query key"], layers: int) -> Float[Tensor, "query key"]:
    """The product of ``layers`` equal layers, [(A + I)/2]^L (Proposition B.8).

    Goes to the matrix whose every row is all on the first token, if every row but the first has two
    non-zero entries; the error shrinks as :func:`second_eigenvalue` to the power of L.
    """
    return torch.linalg.matrix_power(layer_matrix(attention), layers)


def second_eigenvalue(
    diagonal: Float[Tensor, "*batch position"],
) -> Float[Tensor, "*batch"]:
    """Second largest eigenvalue of (A + I)/2 from the diagonal of A, all but the first entry.

    The eigenvalues of a triangular matrix are its diagonal; the first is 1.
    """
    return (1 + diagonal[..., 1:].amax(dim=-1)) / 2


def uniform(length: int, dtype: torch.dtype = torch.float64) -> Float[Tensor, "query key"]:
    """Attention that weighs all it sees alike."""
    seen = torch.ones(length, length, dtype=dtype).tril()
    return seen / seen.sum(dim=-1, keepdim=True)


def hitting_depth(
    blocks: Iterator[tuple[int, Float[Tensor, "batch query key"]]], length: int
) -> Float[Tensor, "batch position"]:
    """Expected number of layers until a token's mass sits on the first, if all were this layer.

    With Q the layer matrix (A + I)/2 without the first token's row and column, (I - Q)^-1 1, solved
    block by block from the top (Kemeny and Snell, Finite Markov Chains, chapter 3). Rows that do
    not sum to one, because a learned sink takes the rest, are made to.

    Args:
        blocks: First query and rows of A, in order; keys after the last query may be left out.
        length: Tokens.

    Returns:
        Layers; 0 for the first token, infinite for a token that cannot get there.
    """
    depth: Tensor | None = None
    for begin, rows in blocks:
        if depth is None:
            depth = rows.new_zeros(rows.shape[0], length, dtype=torch.float64)
        end = begin + rows.shape[1]
        rows = rows[..., :end].double()
        rows = rows / rows.sum(dim=-1, keepdim=True)
        # (I - (A + I)/2) t = 1 is (I - A) t = 2.
        known = 2 + (rows[..., :begin] @ depth[:, :begin, None])
        own = rows[..., begin:]
        eye = torch.eye(end - begin, dtype=own.dtype, device=own.device)
        if begin == 0:  # the first token is there already
            own = own.clone()
            own[:, 0], known[:, 0] = 0, 0
            own[:, :, 0] = 0
        solved = torch.linalg.solve_triangular(eye - own, known, upper=False)[..., 0]
        # A token that looks at nothing but itself divides by zero.
        depth[:, begin:end] = solved.nan_to_num(torch.inf, posinf=torch.inf)
    assert depth is not None
    return depth
