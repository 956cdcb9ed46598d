"""Places in a model where a probe can look, by the field's own names.

One table of facts: the hook that serves each site, and the axes of what it hands over. Resolution,
guards and documentation derive from it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import CaptureError, UsageError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


OUTPUT = ""
"""The model's own output, which is there without a hook."""


@dataclass(frozen=True)
class Site:
    """A place to look.

    Attributes:
        hook: Name of the TransformerLens hook; ``{layer}`` where every block has one.
        axes: Axes of the tensor it carries.
        about: One line for the documentation.
    """

    hook: str
    axes: str
    about: str

    @property
    def per_layer(self) -> bool:
        """Whether every block has its own."""
        return "{layer}" in self.hook


SITES: dict[str, Site] = {
    "embedding": Site("hook_embed", "batch position d_model", "token embedding"),
    "resid_pre": Site(
        "blocks.{layer}.hook_resid_pre", "batch position d_model", "residual stream into a block"
    ),
    "resid_mid": Site(
        "blocks.{layer}.hook_resid_mid",
        "batch position d_model",
        "residual stream between attention and MLP (absent where the two run in parallel)",
    ),
    "resid_post": Site(
        "blocks.{layer}.hook_resid_post", "batch position d_model", "residual stream out of a block"
    ),
    "final_norm": Site(
        "ln_final.hook_out",
        "batch position d_model",
        "final norm's output, what the unembedding reads",
    ),
    "q": Site(
        "blocks.{layer}.attn.hook_q", "batch position head d_head", "queries, before rotation"
    ),
    "k": Site(
        "blocks.{layer}.attn.hook_k", "batch position kv_head d_head", "keys, before rotation"
    ),
    "v": Site("blocks.{layer}.attn.hook_v", "batch position kv_head d_head", "values"),
    "rotated_q": Site(
        "blocks.{layer}.attn.hook_rot_q", "batch position head d_head", "queries, after rotation"
    ),
    "rotated_k": Site(
        "blocks.{layer}.attn.hook_rot_k", "batch position kv_head d_head", "keys, after rotation"
    ),
    "scores": Site(
        "blocks.{layer}.attn.hook_attn_scores",
        "batch head query key",
        "scores before the softmax; masked entries hold the format's lowest number",
    ),
    "pattern": Site(
        "blocks.{layer}.attn.hook_pattern",
        "batch head query key",
        "attention probabilities, in float32 at least (recomputed from the scores in half formats)",
    ),
    "attention": Site(
        "blocks.{layer}.attn.hook_pattern",
        "AttentionCall, or batch head query key",
        "queries, keys and values as attention meets them, so that no pattern need exist; the "
        "pattern where a layer cannot do without",
    ),
    "z": Site(
        "blocks.{layer}.attn.hook_z", "batch position head d_head", "each head's mixture of values"
    ),
    "attn_raw": Site(
        "blocks.{layer}.attn.o.hook_out",
        "batch position d_model",
        "attention's output projection, before any norm that follows it",
    ),
    "attn_out": Site(
        "blocks.{layer}.hook_attn_out", "batch position d_model", "attention's write to the stream"
    ),
    "mlp_out": Site(
        "blocks.{layer}.hook_mlp_out", "batch position d_model", "MLP's write to the stream"
    ),
    "logits": Site("unembed.hook_out", "batch position vocabulary", "logits"),
    "next_token": Site(
        OUTPUT,
        "batch vocabulary",
        "logits at the last position only, as the model returns them (soft caps included)",
    ),
}


def hook_names(model: "TransformerBridge", site: str) -> dict[int | None, str]:
    """The hooks that serve a site on this model, by layer (None for a site outside the blocks).

    Raises:
        UsageError: there is no such site.
        CaptureError: this architecture has no hook for it in any layer.
    """
    if site not in SITES:
        raise UsageError(f"unknown site {site!r}; there are {', '.join(SITES)}")
    found = _hooks(model, site)
    if not found:
        here = [name for name in SITES if has_site(model, name)]
        raise CaptureError(
            f"{model.cfg.architecture} has no site {site!r} ({SITES[site].about}); it has "
            f"{', '.join(here)}."
        )
    return found


def has_site(model: "TransformerBridge", site: str) -> bool:
    """Whether this model has a hook for the site in any layer."""
    return bool(_hooks(model, site))


def _hooks(model: "TransformerBridge", site: str) -> dict[int | None, str]:
    known, place = model.hook_dict, SITES[site]
    if place.hook == OUTPUT:
        return {None: OUTPUT}
    layers: list[int | None] = list(range(int(model.cfg.n_layers))) if place.per_layer else [None]
    return {layer: name for layer in layers if (name := place.hook.format(layer=layer)) in known}


def exact_pattern(
    pattern: Float[Tensor, "batch head query key"],
    scores: Float[Tensor, "batch head query key"] | None,
    sinks: Float[Tensor, " head"] | None,
    layer: int,
) -> Float[Tensor, "batch head query key"]:
    """Attention probabilities in float32 at least, refused where they are not what they should be.

    A half-precision model rounds its pattern to its own format: 8 bits of mantissa for a quantity
    whose rows must sum to one; and a float64 model often takes its softmax in float32. The softmax
    is therefore taken again from the scores, in float32 at least, and must round back to what the
    model used.

    Raises:
        CaptureError: a query sees a later key, a row does not sum to one though the layer has no
            learned sink, or in a half format the scores are not to be had or disagree.
    """
    half = pattern.dtype in (torch.float16, torch.bfloat16)
    if half and scores is None:
        raise CaptureError(
            f"layer {layer}: this architecture shows its attention only after rounding it to "
            f"{str(pattern.dtype).removeprefix('torch.')}. Load this model in float32, or take "
            "backend='fused'."
        )
    if scores is not None:
        rounded = pattern
        logits = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if sinks is not None:
            column = sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, column], dim=-1)
        pattern = logits.softmax(dim=-1)[..., : rounded.shape[-1]]
        error = float((pattern - rounded.to(pattern.dtype)).abs().max())
        # Scores of some size, rounded to float32, move masses by more than float32's own epsilon.
        if error > (torch.finfo(rounded.dtype).eps if half else 1e-5):
            raise CaptureError(
                f"layer {layer}: the softmax of the scores differs from the model's own pattern by "
                f"{error:.2g}, more than rounding explains. Load this model in float32."
            )
    if float(pattern[:, :, 0, 1:].abs().sum()) > 0:
        raise CaptureError(
            f"layer {layer}: the first token attends to later ones; the attention is not causal."
        )
    if sinks is None:
        error = float((pattern.sum(dim=-1) - 1).abs().max())
        if not error < 1e-3:
            raise CaptureError(
                f"layer {layer}: attention rows miss one by up to {error:.2g} though the layer has "
                "no learned sink; eyechart does not know this kind of attention."
            )
    return pattern
