"""The constants of the path-sum bound, measured on the pass that it bounds.

Theorem 5.1 of Barbero et al., arXiv 2406.04267, bounds d y_n / d v_i by a sum over paths. Its
versions (5.1, the statement of B.5, the proof of B.5) disagree on where the constants stand; this
is the proof's, in matrix form, with each constant at the token where it acts:

    B_i = 1/beta3 [ M_L-1 ... M_0 ]_ni      M_l = (I + D_psi) (I + sum_h D_post A^h g_h D_1)

A^h the attention of head h, held fixed; D_1 the reciprocal of what the norm before attention
divides by at the token that is heard; g_h = ||diag(gamma_1) W_V W_O^h diag(gamma_post)||_2; D_post
the same for a norm after attention; D_psi the Lipschitz constant of the MLP with its norms, as
sigma_psi / beta_2. Where attention and MLP run side by side, M_l = I + D_psi + sum_h (...).

sigma_psi is measured: the largest over sampled tokens of the operator norm of the MLP branch's
Jacobian times beta_2 there. Everything else is exact. The bound holds for derivatives with
attention held fixed, as the theorem assumes; the full derivative may exceed it.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.errors import CaptureError
from eyechart.flow.modules import (
    Function,
    Norm,
    function,
    linear_of,
    near,
    norm_of,
    operator_norms,
    output_matrix,
    part,
    scale_of,
)
from eyechart.flow.trace import Layer, Trace, spread_of
from eyechart.probes.plan import without_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

VARIANT = (
    "proof of Theorem B.5 in matrix form: sum over heads, norms measured at each token, "
    "||W_V W_O|| by head, sigma_psi the largest measured at sampled tokens"
)


@dataclass(frozen=True, eq=False)
class LayerGains:
    """How much one block can stretch a perturbation.

    Attributes:
        value: g_h.
        before: 1 / beta_1 at the token that is heard.
        write: The same for a norm after attention, at the token that hears; 1 without one.
        mlp: 1 + sigma_psi / beta_2.
        parallel: Whether attention and MLP run side by side.
    """

    value: Float[Tensor, " head"]
    before: Float[Tensor, "batch position"]
    write: Float[Tensor, "batch position"]
    mlp: Float[Tensor, "batch position"]
    parallel: bool

    def sent(self, bound: Float[Tensor, "batch position"]) -> Float[Tensor, "batch position"]:
        """What goes into attention's share, from a row over the block's output."""
        return bound * self.write * (1 if self.parallel else self.mlp)

    def received(
        self,
        bound: Float[Tensor, "batch position"],
        carried: Float[Tensor, "batch head position"],
    ) -> Float[Tensor, "batch position"]:
        """The row over the block's input, from that over its output and what attention carried."""
        through = torch.einsum("bhk,h->bk", carried, self.value)
        return bound * self.mlp + through * self.before


@dataclass(frozen=True, eq=False)
class Gains:
    """Constants of the bound: of the final norm at the chosen token, and of every block below."""

    final: Float[Tensor, " batch"]
    layers: dict[int, LayerGains] = field(default_factory=dict)


def gains_of(
    model: "TransformerBridge", trace: Trace, query: Int[Tensor, " batch"], target: int | None
) -> Gains:
    """Measure the constants.

    Args:
        model: The model that the trace is of.
        trace: A pass with samples.
        query: The chosen position of each sequence.
        target: Block whose output is bounded; None for the final norm's.

    Raises:
        CaptureError: a block does something that these constants do not describe.
    """
    device = torch.device(str(model.cfg.device))
    last = max(trace.layers) if target is None else target
    with without_hooks(model):
        layers = {
            index: _layer_gains(model, index, trace.layers[index].to(device))
            for index in sorted(trace.layers)
            if index <= last
        }
        final = torch.ones(len(query), dtype=torch.float64, device=device)
        if target is None and (module := part(model, None, "ln_final")) is not None:
            layer = trace.layers[last].to(device)
            norm = norm_of(module, layer.samples["resid_post"][0, 0])
            spread = _there(layer.spread_after)[torch.arange(len(query)), query.to(device)]
            assert norm.weight is not None
            final = norm.weight.abs().max() / norm.sigma(spread).double()
    return Gains(final, layers)


def _layer_gains(model: "TransformerBridge", index: int, layer: Layer) -> LayerGains:
    samples = layer.samples
    before, after = samples["resid_pre"], samples["resid_post"]
    parallel = "resid_mid" not in samples
    mid = before if parallel else samples["resid_mid"]
    mlp_write = after - mid - (samples["attn_out"] if parallel else 0)
    like = before[0, 0]

    norm, matrix = _value_path(model, index, before, samples.get("values"))
    post = norm_of(part(model, index, "ln1_post"), like)
    values = _there(samples.get("values"))
    width = values.shape[-1]
    out = output_matrix(model, index, layer.heads, width, like, samples).double()
    scale = 1.0 if parallel else scale_of(samples["attn_out"], mid - before, index)
    if post.weight is not None:
        out = out * post.weight
    out = out * scale
    shared = layer.heads // matrix.shape[0]
    into = matrix.repeat_interleave(shared, dim=0)  # query head h reads key head h // shared
    value = _norm_of_product(into, out)

    lipschitz, beta = _mlp(model, index, mid, mlp_write)
    spread_mid = _there(layer.spread_before if parallel else layer.spread_mid)
    return LayerGains(
        value=value,
        before=1 / norm.sigma(_there(layer.spread_before)).double(),
        write=1 / post.sigma(_there(layer.spread_raw)).double()
        if post.weight is not None
        else torch.ones_like(spread_mid[..., 0]).double(),
        mlp=1 + lipschitz / beta.sigma(spread_mid).double(),
        parallel=parallel,
    )


def _value_path(
    model: "TransformerBridge",
    index: int,
    before: Float[Tensor, "batch sample d_model"],
    values: Float[Tensor, "batch sample kv_head d_value"] | None,
) -> tuple[Norm, Float[Tensor, "kv_head d_model d_value"]]:
    """The norm before the values, and diag(gamma) W_V: checked against the values of the pass."""
    module = part(model, index, "attn.v")
    if module is None or values is None:
        raise CaptureError(f"layer {index}: the values come from no projection of their own")
    first = part(model, index, "ln1")
    truth = values.flatten(2)
    with torch.no_grad():
        normed = before
        if first is not None:
            normed = function(first)(before.flatten(0, 1)).unflatten(0, before.shape[:2])
        found = function(module)(normed.flatten(0, 1)).unflatten(0, normed.shape[:2])
    if found.shape != truth.shape or not near(found, truth):
        raise CaptureError(f"layer {index}: the values are not one matrix times the normed stream")
    norm = norm_of(first, before[0, 0])
    matrix = linear_of(module, before.shape[-1], before[0, 0]).double()
    if norm.weight is not None:
        matrix = norm.weight[:, None] * matrix
    groups = values.shape[2]
    return norm, matrix.unflatten(1, (groups, -1)).transpose(0, 1)


def _mlp(
    model: "TransformerBridge", index: int, read: Tensor, write: Tensor
) -> tuple[Float[Tensor, "batch one"], Norm]:
    """sigma_psi of the MLP branch, and the norm it begins with.

    Which norms belong to the branch is found by trying: one choice reproduces what it wrote.
    """
    mlp = part(model, index, "mlp")
    if mlp is None:
        raise CaptureError(f"layer {index} has no MLP that can be told apart")
    post = part(model, index, "ln2_post")
    for name in ("ln2", "ln1", None):
        norm = None if name is None else part(model, index, name)
        if name is not None and norm is None:
            continue
        steps = [function(m) for m in (norm, mlp, post) if m is not None]
        with torch.no_grad():
            found = _chain(steps)(read.flatten(0, 1)).unflatten(0, read.shape[:2])
        if found.shape != write.shape:
            break
        size = found.double().square().sum()
        scale = float((found.double() * write.double()).sum() / size) if size else 1.0
        if near(found * scale, write):
            kind = norm_of(norm, read[0, 0])
            norms = operator_norms(_chain(steps), read.flatten(0, 1)).unflatten(0, read.shape[:2])
            sigma = norms.double() * abs(scale) * kind.sigma(spread_of(read)).double()
            return sigma.amax(dim=-1, keepdim=True), kind
    raise CaptureError(f"layer {index}: the MLP's part of the stream could not be reproduced")


def _chain(steps: list[Function]) -> Function:
    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


def _norm_of_product(
    left: Float[Tensor, "head d_model d_value"], right: Float[Tensor, "head d_value d_model"]
) -> Float[Tensor, " head"]:
    """Operator norm of left @ right by way of the small factors of its QR decompositions."""
    small = torch.linalg.qr(left).R @ torch.linalg.qr(right.transpose(-1, -2)).R.transpose(-1, -2)
    return torch.linalg.matrix_norm(small, ord=2)


def _there(x: Tensor | None) -> Tensor:
    if x is None:
        raise CaptureError("the pass kept too little for the bound")
    return x
