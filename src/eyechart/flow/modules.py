"""A model's norms, projections and MLPs as functions to be tried, so that no layout is assumed.

Every architecture names and packs its weights in its own way (transposed, fused, scaled by one plus
the weight). What a module does to chosen inputs says the same in one way for all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from eyechart.errors import CaptureError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm layer: x -> weight * (x - mean) / sigma, without its bias.

    Attributes:
        centred: Whether the mean is taken off (LayerNorm); then sigma is the standard deviation,
            else (RMSNorm) the root mean square.
        weight: Its learned scale; None for no norm at all.
    """

    centred: bool = False
    weight: Float[Tensor, " d_model"] | None = None

    def sigma(self, spread: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
        """What the norm divides by, from root mean square and standard deviation."""
        if self.weight is None:
            return torch.ones_like(spread[..., 0])
        return spread[..., int(self.centred)].clamp(min=1e-12)


def part(model: "TransformerBridge", layer: int | None, name: str) -> nn.Module | None:
    """A component of a block (``ln1``, ``attn.o``, ``mlp``) or of the model, None if absent."""
    found: Any = model if layer is None else model.blocks[layer]
    for step in name.split("."):
        found = dict(found.named_children()).get(step)
        if found is None:
            return None
    return found


def function(module: nn.Module) -> Function:
    """A module as a function of a batch of vectors, its own hooks left alone.

    The function raises CaptureError where the module wants more than vectors.
    """
    plain = getattr(module, "original_component", None)
    plain = module if plain is None else plain

    weights = (p.dtype for p in plain.parameters() if p.is_floating_point())
    kind = next(weights, None)

    def apply(x: Tensor) -> Tensor:
        try:
            out = plain(x[None].to(kind or x.dtype))
        except (TypeError, RuntimeError) as problem:
            raise CaptureError(
                f"{type(plain).__name__} cannot be tried by itself: {problem}"
            ) from problem
        # Some experts take the batch axis off.
        return (out[0] if isinstance(out, tuple) else out).reshape(len(x), -1).to(x.dtype)

    return apply


def norm_of(module: nn.Module | None, like: Tensor) -> Norm:
    """What kind of norm a module is, and its scale, from what it does to two random vectors.

    Args:
        module: The norm; None where the architecture has none.
        like: A vector of the right width, format and device.

    Raises:
        CaptureError: it is neither LayerNorm nor RMSNorm.
    """
    if module is None:
        return Norm()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, like.shape[-1], generator=draw, dtype=torch.float32)
    x = 32 * (x + 1).to(like)  # large, so that the norm's own epsilon is nothing beside it
    run = function(module)
    with torch.no_grad():
        odd = (run(x) - run(-x)).double() / 2  # what a bias adds is even
    if torch.equal(odd, x.double()):
        return Norm()
    x = x.double()
    for centred in (False, True):
        plain = x - x.mean(dim=-1, keepdim=True) if centred else x
        plain = plain / plain.square().mean(dim=-1, keepdim=True).sqrt()
        weight = (odd * plain).sum(dim=0) / plain.square().sum(dim=0)
        error = (odd - weight * plain).norm() / odd.norm()
        if error < 0.02:
            return Norm(centred, weight)
    raise CaptureError(f"{type(module).__name__} is neither a LayerNorm nor an RMSNorm")


def linear_of(module: nn.Module, width: int, like: Tensor) -> Float[Tensor, "d_in d_out"]:
    """The matrix of an affine module: what it does to unit vectors, less what it does to zero."""
    run = function(module)
    with torch.no_grad():
        unit = torch.eye(width, dtype=like.dtype, device=like.device)
        return run(unit) - run(torch.zeros_like(unit[:1]))


def output_matrix(
    model: "TransformerBridge",
    layer: int,
    heads: int,
    d_value: int,
    like: Tensor,
    samples: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "head d_value d_model"]:
    """W_O of each head.

    Args:
        model: A TransformerBridge.
        layer: The block.
        heads: Query heads.
        d_value: Width of a head's values.
        like: A vector of the stream's width, format and device.
        samples: Mixtures of values ("mixed") and what attention made of them ("attn_raw"), against
            which the matrix is checked.

    Raises:
        CaptureError: the block's attention has no output projection of its own, or something acts
            between it and the heads (a gate, a norm).
    """
    module = part(model, layer, "attn.o")
    if module is None:
        raise CaptureError(f"layer {layer}: attention has no output projection that can be told")
    matrix = linear_of(module, heads * d_value, like)
    if samples is not None:
        made = (samples["mixed"].to(matrix) @ matrix).flatten(0, 1)
        truth = samples["attn_raw"].to(matrix).flatten(0, 1)
        # A bias is the same for all tokens.
        made, truth = made - made[:1], truth - truth[:1]
        if not near(made, truth):
            raise CaptureError(
                f"layer {layer}: what its heads move through W_O is not what attention writes (off "
                f"by {float((made - truth).norm() / truth.norm()):.2g}): something acts in between"
            )
    return rearrange(matrix, "(h d) m -> h d m", h=heads)


def operator_norms(
    run: Function, x: Float[Tensor, "position d_model"], steps: int = 16
) -> Float[Tensor, " position"]:
    """Largest singular value of the Jacobian of a function of single vectors, at each of them.

    Power iteration on J^T J, until no value grows by more than one per cent; products with J come
    from differentiating J^T u by u. From below: where the leading singular values lie close, a few
    per cent are missing.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = run(x)
        if not y.requires_grad:
            raise CaptureError("the MLP passes no gradient on (quantised or detached weights)")
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
        draw = torch.Generator().manual_seed(0)
        # The same start everywhere, so that a vector's norm does not depend on its company.
        v = torch.randn(x.shape[-1], generator=draw, dtype=torch.float32).to(x).expand_as(x)
        size = torch.zeros_like(v[:, 0])
        for _ in range(steps):
            v = v / v.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            before, size = size, pushed.norm(dim=-1)
            if bool((size <= 1.01 * before).all()):
                break
            (v,) = torch.autograd.grad(y, x, pushed, retain_graph=True)
    return size.detach()


def scale_of(write: Tensor, change: Tensor, index: int) -> float:
    """The factor with which a block's write entered the stream; Granite has one that is not 1.

    Raises:
        CaptureError: no factor makes the one of the other.
    """
    write, change = write.double(), change.double()
    size = write.square().sum()
    scale = float((write * change).sum() / size) if size else 1.0
    if not near(write * scale, change):
        raise CaptureError(f"layer {index}: what attention wrote is not what the stream gained")
    return 1.0 if abs(scale - 1) < 1e-2 else scale


def near(found: Tensor, truth: Tensor, tolerance: float = 0.05) -> bool:
    """Whether two ways to the same activations agree, up to what rounding in half formats may do.

    Another layout, a gate or a norm in between is off by far more.
    """
    return bool((found - truth).norm() <= tolerance * truth.norm() + 1e-6)
