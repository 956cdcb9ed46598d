"""``eyechart.rank_collapse``: how far tokens become one and the same, with and without what
prevents it.

The variants are the same weights with other sums. Every block reads a stream x, attention writes a,
the MLP writes m, and the block hands on x + a + m. A variant hands on the sum of what it keeps, put
together from the writes themselves: a stream that was added is never taken off again, so nothing
cancels. Which activations the writes are is not assumed but seen in the pass of the full model,
where they must add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import NonFiniteError, UsageError
from eyechart.models import facts_of
from eyechart.probes import (
    Look,
    Observations,
    StreamProbe,
    capture,
    depth_labels,
    has_site,
    hook_names,
)
from eyechart.results import Provenance, Sequences
from eyechart.results.rank import MEASURES, RankCollapse
from eyechart.sequences import Inputs, prepare

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Kept:
    """What a variant keeps of a block: its residual connections, its MLP."""

    skip: bool
    mlp: bool


VARIANTS = {
    "full": Kept(skip=True, mlp=True),
    "no MLP": Kept(skip=True, mlp=False),
    "no skip": Kept(skip=False, mlp=True),
    "attention only": Kept(skip=False, mlp=False),
}

_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def rank_collapse(
    model: "TransformerBridge",
    inputs: Inputs | None = None,
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
) -> RankCollapse:
    """Rank of the token representations at every depth, in the model and in what is left of it.

    Dong et al., arXiv 2103.03404: attention alone makes all tokens alike, doubly exponentially with
    depth; residual connections stop it, MLPs slow it. One forward pass a variant; spectra are
    computed in float64 and take the time of two singular value decompositions of ``[token
    d_model]`` a layer, text and variant, with and without the first token.

    Args:
        model: A TransformerBridge.
        inputs: String, strings, token ids ``[batch position]`` or Sequences; None takes a short
            original English text.
        variants: Which of "full", "no MLP", "no skip" and "attention only" to measure. The full
            model is always among them: its pass shows what blocks write.
        prepend_bos: See :func:`eyechart.sequences.prepare`.
        batch_size: Sequences a pass; all at once by default.

    Returns:
        Measures ``[variant text layer]``: embedding, every block, and the final norm's output.
        Where the writes do not add up, or a variant's stream overflows, the variant is left out and
        ``unavailable`` says why.

    Raises:
        UsageError: an unknown variant.
        InputError, CaptureError, NonFiniteError, UnsupportedModelError: as
            :func:`eyechart.capture`.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise UsageError(f"unknown variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    facts = facts_of(model)
    prepared = prepare(model, inputs, prepend_bos=prepend_bos)
    wiring = Wiring(model)
    found: dict[str, Tensor] = {}
    unavailable: dict[str, str] = {}
    sources: list[Provenance] = []
    without = sorted(set(range(facts.n_layers)) - set(facts.attention_layers))
    mixers = f"blocks {', '.join(map(str, without))} have no attention" if without else ""
    for name in dict.fromkeys(("full", *variants)):
        if name != "full" and (mixers or wiring.problem):
            unavailable[name] = mixers or str(wiring.problem)
            continue
        wiring.kept = VARIANTS[name]
        try:
            with model.hooks(fwd_hooks=wiring.hooks):
                ((found[name], source),) = capture(
                    model, prepared, [RankProbe()], batch_size=batch_size
                )
        except NonFiniteError as problem:
            if name == "full":
                raise
            unavailable[name] = str(problem)
        else:
            sources.append(source)
    measured = torch.stack(list(found.values()))
    return RankCollapse(
        sequences=prepared,
        provenance=Provenance.together(sources, prepared.digest, None),
        variants=tuple(found),
        layer_labels=depth_labels(facts.n_layers, measured.shape[2]),
        unavailable=unavailable,
        **{
            f"{measure}{suffix}": measured[..., part, index].contiguous()
            for part, suffix in enumerate(("", "_without_first"))
            for index, measure in enumerate(MEASURES)
        },
    )


class RankProbe(StreamProbe[tuple[Tensor, Provenance]]):
    """Reduces each text's states to their measures, of all tokens and of all but the first."""

    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """``[batch part measure]``."""
        texts = [states[real].cpu() for states, real in zip(stream, look.mask, strict=True)]
        parts = [torch.stack([measures(x), measures(x[1:])]) for x in texts]
        return {"measures": torch.stack(parts)}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> tuple[Float[Tensor, "text layer part measure"], Provenance]:
        """Embedding first, then every block, then the final norm's output if there is one."""
        return self.at_every_depth(observations, "measures"), provenance


class Wiring:
    """Hooks that hand on of every block what is kept of it.

    With everything kept they change nothing, and check that the writes are what the stream gains.

    Attributes:
        kept: What is kept in the next pass.
        hooks: For ``model.hooks``.
        problem: Where and how the writes of the full model do not add up, None where they do.
    """

    def __init__(self, model: "TransformerBridge") -> None:
        self.kept = VARIANTS["full"]
        self.problem: str | None = None
        self.hooks: list[Any] = [
            (name, partial(self._pass, site, layer))
            for site in _SITES
            if has_site(model, site)
            for layer, name in hook_names(model, site).items()
            if layer is not None
        ]
        self._block: dict[str, Tensor] = {}

    def _pass(self, site: str, layer: int, value: Tensor, hook: Any) -> Tensor | None:
        if site == "resid_pre":
            before = self._block.get("resid_post")
            self._block = {}
            if layer and before is not None and self.kept == VARIANTS["full"]:
                self._check(layer, [before], value, "the block before handed on something else")
        self._block[site] = value
        if site not in ("resid_mid", "resid_post"):
            return None
        if self.kept == VARIANTS["full"]:
            return self._check_sum(site, layer, value)
        if site == "resid_mid" and self.kept.skip:
            return None  # it is that sum already
        first, *rest = self._terms(site)
        return sum(rest, start=first)

    def _terms(self, site: str) -> list[Tensor]:
        """What the stream is the sum of, before the MLP ("resid_mid") or after it."""
        block, kept = self._block, self.kept
        after = site == "resid_post"
        # Without the skip, what attention writes is the input of an MLP that comes after it, and
        # stands beside what an MLP in parallel writes; those blocks have no stream in between.
        handed_on = kept.skip or not after or not kept.mlp or "resid_mid" not in block
        return [
            *([block["resid_pre"]] if kept.skip else []),
            *([block["attn_out"]] if handed_on else []),
            *([block["mlp_out"]] if after and kept.mlp else []),
        ]

    def _check_sum(self, site: str, layer: int, value: Tensor) -> None:
        needed = ("resid_pre", "attn_out", *(("mlp_out",) if site == "resid_post" else ()))
        missing = [name for name in needed if name not in self._block]
        if missing:
            said = f"layer {layer}: {' and '.join(missing)} did not come by before {site}"
            self.problem = self.problem or said
            return
        wrote = "attention writes" if site == "resid_mid" else "attention and MLP write"
        self._check(layer, self._terms(site), value, f"what {wrote} is not what the stream gains")

    def _check(self, layer: int, terms: list[Tensor], value: Tensor, said: str) -> None:
        # A sum of three is rounded twice, here and in the model, by half a unit of the last place.
        coarsest = max(torch.finfo(x.dtype).eps for x in (*terms, value))
        wide = torch.promote_types(value.dtype, torch.float32)
        parts = [x.to(value.device, wide) for x in terms]
        error = (sum(parts) - value.to(wide)).abs()
        if bool((error > 4 * coarsest * sum(x.abs() for x in parts)).any()):
            self.problem = self.problem or (
                f"layer {layer}: {said} (off by up to {float(error.max()):.2g})"
            )


def measures(states: Float[Tensor, "token d_model"]) -> Float[Tensor, " measure"]:
    """The measures of one matrix of token states, in float64 and in the order of MEASURES.

    Definitions and sources: :class:`eyechart.results.RankCollapse`.
    """
    x = states.double()
    tokens = len(x)
    if not tokens:
        return x.new_full((len(MEASURES),), torch.nan)
    centred = x - x.mean(dim=0)
    # Lengths and angles need no more dimensions than there are tokens, and spectra cost less there.
    turned = torch.linalg.qr(x.T, mode="r").R.T if tokens < x.shape[1] else x
    spectrum = torch.linalg.svdvals(turned)
    found = {
        "residual": composite_norm(centred) / composite_norm(x),
        "effective_rank": entropy(spectrum).exp(),
        "matrix_entropy": entropy(spectrum.square()),
        "matrix_entropy_normalised": entropy(spectrum_of_directions(turned, states.dtype).square())
        / x.new_tensor(tokens).log(),
        "mean_cosine": mean_cosine(turned),
    }
    return torch.stack([found[name] for name in MEASURES])


def spectrum_of_directions(
    x: Float[Tensor, "token d_model"], dtype: torch.dtype
) -> Float[Tensor, " value"]:
    """Singular values after the mean over tokens is taken off and rows are of unit length.

    What is left of a token like all others is rounding in ``dtype``, the format the states were
    computed in; it has no direction and is taken for zero.
    """
    centred = x - x.mean(dim=0)
    noise = 8 * torch.finfo(dtype).eps * x.norm(dim=1, keepdim=True)
    apart = centred.where(centred.norm(dim=1, keepdim=True) > noise, 0)
    return torch.linalg.svdvals(_unit(apart))


def composite_norm(x: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """Square root of the induced 1-norm times the induced infinity-norm."""
    size = x.abs()
    return (size.sum(dim=0).amax() * size.sum(dim=1).amax()).sqrt()


def entropy(weights: Float[Tensor, " value"]) -> Float[Tensor, ""]:
    """Shannon entropy, in nats, of non-negative weights over their sum; NaN where that is zero."""
    share = weights / weights.sum()
    return -torch.xlogy(share, share).sum()


def mean_cosine(x: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """Mean cosine over all pairs of two tokens whose states are not zero."""
    unit = _unit(x[x.any(dim=1)])
    tokens = len(unit)
    if tokens < 2:
        return x.new_tensor(torch.nan)
    return (unit.sum(dim=0).square().sum() - tokens) / (tokens * (tokens - 1))


def _unit(x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    # Rows of zeros stay what they are; however small another is, it has a direction.
    return x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
