"""One forward pass with probes attached, and every firing of their hooks counted."""

import inspect
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eyechart.errors import CaptureError, NonFiniteError, UsageError
from eyechart.kernels import AttentionCall, Tree, attend
from eyechart.probes.kept import Shelf
from eyechart.probes.probe import Look, Probe
from eyechart.probes.seam import edits_of, taken_over
from eyechart.probes.sites import OUTPUT, exact_pattern, hook_names
from eyechart.results.sequences import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Place = tuple[str, int | None]
Wanted = Sequence[tuple[Probe[Any], tuple[str, ...]]]
Kept = dict[tuple[str, str], Shelf]


class Pass:
    """The state of one forward pass.

    Args:
        model: A TransformerBridge.
        rows: The sequences, all of which go through at once.
        wanted: Probes with the sites they look at.
        fused: Layers whose attention is taken over, for the probes that look at "attention".

    Attributes:
        kept: What each probe kept.
        fired: How often each place was passed.
    """

    def __init__(
        self,
        model: "TransformerBridge",
        rows: Sequences,
        wanted: Wanted,
        fused: Collection[int] = (),
    ) -> None:
        self.model, self.wanted, self.fused = model, wanted, frozenset(fused)
        self.kept: list[Kept] = [{} for _ in wanted]
        self.fired: Counter[Place] = Counter()
        device = model.cfg.device
        self.tokens, self.mask = rows.tokens.to(device), rows.mask.to(device)
        self._tree = None if rows.parents is None else Tree(rows.parents[0])
        self._scores: dict[int, Tensor] = {}
        self._lookers: dict[str, list[int]] = defaultdict(list)
        for index, (_, sites) in enumerate(wanted):
            for site in sites:
                self._lookers[site].append(index)
        at = {wanted[index][0].next_token_at for index in self._lookers.get("next_token", ())}
        if len(at) > 1:
            raise UsageError("probes of one pass ask for the logits of different positions")
        self._at = next(iter(at), None)
        self.needed = self._needed()
        # The residual stream is always watched, so that NaN stops the pass where it appears.
        self._hooks: dict[str, list[Place]] = defaultdict(list)
        watched = self.needed | self._places("resid_post")
        if (
            any(self._reads_pattern(place) for place in self.needed)
            and self._patterns_are_rounded()
        ):
            watched |= self._places("scores")
        for place, name in watched.items():
            if not self._is_fused(place) and name != OUTPUT:
                self._hooks[name].append(place)

    def forward(self) -> None:
        """Run the model; the probes look.

        Raises:
            UnfusableError: a layer that should be taken over cannot be.
            CaptureError, NonFiniteError: as :func:`eyechart.capture`.
        """
        hooks = [(name, partial(self._see, places)) for name, places in self._hooks.items()]
        options = thrift(self.model, logits="logits" in self._lookers, at=self._at)
        if self._tree is not None:
            # With a mask, transformers does not take positions that start anew for packed texts.
            options["position_ids"] = self._tree.depth[None].to(self.tokens.device)
            options["attention_mask"] = torch.ones_like(self.tokens)
        everywhere = not any(self._reads_pattern(place) for place in self.needed)
        seam = taken_over(self.model, sorted(self.fused), everywhere, self._attend)
        # No attention mask: under causal attention no real token sees the padding after it, and
        # some architectures lose their causal mask when they are given one for the padding.
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks), seam:
            wanted = "logits" if "next_token" in self._lookers else None
            output = self.model(self.tokens, return_type=wanted, **options)
        if wanted:
            self.fired["next_token", None] += 1
            self._look(("next_token", None), self._next_token(output))

    def _next_token(self, output: Tensor) -> Tensor:
        if self._at is None:
            return output[:, -1]
        # Not every architecture can be asked for chosen positions.
        return output if output.shape[1] == len(self._at) else output[:, list(self._at)]

    def fired_by_site(self) -> dict[str, int]:
        """How often the places of each site were passed."""
        by_site: Counter[str] = Counter()
        for (site, _), times in self.fired.items():
            by_site[site] += times
        return dict(by_site)

    def check_fired(self) -> None:
        """Refuse a pass in which a place was missed or passed repeatedly.

        Raises:
            CaptureError: names the places.
        """
        wrong = {place: self.fired[place] for place in self.needed if self.fired[place] != 1}
        if wrong:
            said = ", ".join(
                f"{site} of layer {layer} {times} times"
                if layer is not None
                else f"{site} {times} times"
                for (site, layer), times in list(wrong.items())[:4]
            )
            raise CaptureError(
                f"{len(wrong)} of {len(self.needed)} hooks did not fire exactly once ({said}"
                f"{', ...' if len(wrong) > 4 else ''}): {self.model.cfg.architecture} declares "
                "them but passes through them never or repeatedly, so what they carry cannot be "
                "tied to one place in the model."
            )

    def _needed(self) -> dict[Place, str]:
        needed: dict[Place, str] = {}
        for site in self._lookers:
            needed |= self._places(site)
        if "scores" in self._lookers:
            needed |= self._places("pattern")  # to see which comes first
        return needed

    def _places(self, site: str) -> dict[Place, str]:
        return {(site, layer): name for layer, name in hook_names(self.model, site).items()}

    def _is_fused(self, place: Place) -> bool:
        return place[0] == "attention" and place[1] in self.fused

    def _reads_pattern(self, place: Place) -> bool:
        return place[0] in ("pattern", "attention") and not self._is_fused(place)

    def _patterns_are_rounded(self) -> bool:
        # To a half format, or from float64 to the float32 that softmax is often taken in.
        return any(p.dtype != torch.float32 for p in self.model.parameters())

    def _look(self, place: Place, activation: Any, sinks: Tensor | None = None) -> None:
        site, layer = place
        device = activation.q.device if isinstance(activation, AttentionCall) else activation.device
        look = Look(site, layer, self.mask.to(device), self.tokens.to(device), sinks)
        for index in self._lookers.get(site, ()):
            for name, value in self.wanted[index][0].observe(activation, look).items():
                kept = self.kept[index]
                if (site, name) not in kept:
                    kept[site, name] = Shelf(len(hook_names(self.model, site)))
                kept[site, name].put(layer, value)

    def _attend(self, layer: int, call: AttentionCall) -> Tensor:
        self.fired["attention", layer] += 1
        call.tree = self._tree
        for edit in edits_of(self.model):
            edit(layer, call)
        try:
            self._look(("attention", layer), call)
            if call.output is None:
                attend(call, self.tokens.to(call.q.device), self.mask.to(call.q.device))
        except NonFiniteError as problem:
            raise NonFiniteError(
                f"layer {layer} of {self.model.cfg.model_name}: {problem}. In float16 this is "
                "usually overflow: load the model in float32 or bfloat16."
            ) from problem
        assert call.output is not None
        return call.output

    def _see(self, places: list[Place], activation: Tensor, hook: Any) -> Tensor | None:
        exact: Tensor | None = None
        for place in places:
            site, layer = place
            self.fired[place] += 1
            sinks = None
            if site == "resid_post":
                self._refuse_non_finite(activation, layer)
            elif site == "scores":
                self._keep_scores(activation, layer)
            elif site in ("pattern", "attention"):
                assert layer is not None
                component = self.model.blocks[layer].attn.original_component
                sinks = getattr(component, "sinks", None)
                if exact is None:
                    exact = exact_pattern(activation, self._scores.pop(layer, None), sinks, layer)
            self._look(place, activation if exact is None else exact, sinks)
        # A float64 model goes on with a float64 pattern, or its later layers would be float32's.
        return exact if activation.dtype == torch.float64 else None

    def _keep_scores(self, activation: Tensor, layer: int | None) -> None:
        assert layer is not None
        if self.fired["pattern", layer] or self.fired["attention", layer]:
            if "scores" not in self._lookers:
                return  # the pattern was taken as it is, or refused
            raise CaptureError(
                f"layer {layer}: what {self.model.cfg.architecture} hands over as scores comes "
                "after the softmax, so there are no scores to be had here."
            )
        self._scores[layer] = activation

    def _refuse_non_finite(self, activation: Tensor, layer: int | None) -> None:
        # One sum tells nearly always, at a fraction of the price: a bad number spoils it.
        wide = torch.promote_types(activation.dtype, torch.float32)
        if bool(activation.sum(dtype=wide).isfinite()):
            return
        # Padding may hold anything; only what real tokens carry counts.
        padding = ~self.mask.to(activation.device)[..., None]
        if not activation.masked_fill(padding, 0).isfinite().all():
            raise NonFiniteError(
                f"the residual stream of {self.model.cfg.model_name} holds NaN or infinity after "
                f"layer {layer}. In float16 this is usually overflow: load the model in float32 or "
                "bfloat16. Otherwise look at that layer's weights."
            )


def thrift(
    model: "TransformerBridge", logits: bool = False, at: Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments that keep a forward pass from making what nobody looks at.

    Args:
        model: A TransformerBridge.
        logits: Whether those of all positions are wanted.
        at: Positions whose logits are wanted; None for the last.
    """
    accepted = inspect.signature(type(model.original_model).forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    if not logits and "logits_to_keep" in accepted:
        device = model.cfg.device
        options["logits_to_keep"] = 1 if at is None else torch.tensor(at, device=device)
    return options
