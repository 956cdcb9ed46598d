"""What one forward pass leaves behind, so that rows can be carried back through its layers.

Kept a layer: queries and keys (from which attention can be had again, block by block), values, and
the stream before and after attention where contributions are asked for. All of it is linear in
length; only layers that cannot do without their pattern keep that.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eyechart.kernels import AttentionCall, attend, blocks, carry
from eyechart.probes import Look, Observations, Probe, has_site
from eyechart.results import Provenance, Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SAMPLE = 16
_AROUND = ("resid_pre", "attn_raw", "attn_out")
_SPREADS = ("resid_pre", "attn_raw", "attn_out", "resid_mid", "resid_post")
_BLOCK = 128  # queries of a kept pattern that are handed on at once


@dataclass(eq=False)
class Layer:
    """One layer's attention, to be read as often as needed.

    Attributes:
        call: Queries, keys and values; None where only the pattern could be had.
        lse: Log-sum-exp of the scores, where a kernel returned it.
        pattern: Attention, where only that could be had.
        diagonal: What each query gives itself.
        values: Values as attention mixes them.
        before: Stream into the block.
        raw: Attention's output projection.
        write: What attention added to the stream, after a norm where there is one.
        spread_before: Root mean square and standard deviation of the stream into the block, by
            position.
        spread_mid: The same of the stream between attention and MLP.
        spread_after: The same of the stream out of the block.
        spread_raw: The same of attention's output before a norm that follows it.
        samples: Stream and writes at a few positions, by site; "values" are those of each head, and
            "mixed" each head's mixture of them as attention computed it, side by side.
    """

    call: AttentionCall | None = None
    lse: Float[Tensor, "batch head query"] | None = None
    pattern: Float[Tensor, "batch head query key"] | None = None
    diagonal: Float[Tensor, "batch head query"] | None = None
    values: Float[Tensor, "batch kv_head key d_value"] | None = None
    before: Float[Tensor, "batch position d_model"] | None = None
    raw: Float[Tensor, "batch position d_model"] | None = None
    write: Float[Tensor, "batch position d_model"] | None = None
    spread_before: Float[Tensor, "batch position 2"] | None = None
    spread_mid: Float[Tensor, "batch position 2"] | None = None
    spread_after: Float[Tensor, "batch position 2"] | None = None
    spread_raw: Float[Tensor, "batch position 2"] | None = None
    samples: dict[str, Float[Tensor, "batch sample *rest"]] = field(default_factory=dict)

    def carry(
        self, rows: Float[Tensor, "batch row query"], accumulate: torch.dtype
    ) -> Float[Tensor, "batch head row key"]:
        """Row vectors times each head's attention."""
        if self.call is not None:
            return carry(self.call, rows, self.lse, accumulate)
        assert self.pattern is not None
        return rows[:, None].to(self.pattern.dtype) @ self.pattern

    def blocks(
        self, accumulate: torch.dtype
    ) -> Iterator[tuple[int, Float[Tensor, "batch head query key"]]]:
        """Attention rows in order of queries; keys after a block's last query are left out."""
        if self.call is not None:
            kind = torch.promote_types(self.call.q.dtype, accumulate)
            for begin, _, rows in blocks(self.call, kind):
                yield begin, rows
        else:
            assert self.pattern is not None
            for begin in range(0, self.pattern.shape[-1], _BLOCK):
                yield begin, self.pattern[:, :, begin : begin + _BLOCK, : begin + _BLOCK]

    def to(self, device: torch.device) -> "Layer":
        """The layer on the device where it is to be read."""
        moved = _moved(self, device)
        moved["samples"] = {site: x.to(device) for site, x in self.samples.items()}
        if self.call is not None:
            moved["call"] = dataclasses.replace(self.call, **_moved(self.call, device))
        return dataclasses.replace(self, **moved)

    @property
    def heads(self) -> int:
        """Query heads."""
        found = self.pattern if self.call is None else self.call.q
        assert found is not None
        return found.shape[1]


@dataclass(frozen=True, eq=False)
class Trace:
    """A pass's layers with the sequences they were passed by.

    Attributes:
        layers: By block; blocks without attention are missing.
        sequences: The tokens.
        provenance: Of the pass.
    """

    layers: dict[int, Layer]
    sequences: Sequences
    provenance: Provenance


class TraceProbe(Probe[Trace]):
    """Keeps what later walks back through the layers need.

    Args:
        contributions: Keep values and the stream around attention, for value-weighted measures.
        bound: Keep the size of the stream at every position and samples of it, for the bound.
        values_hook: Whether there are layers whose values must come from their own hook, because
            attention is read by its pattern there.
        accumulate: Number format of softmax and sums.
    """

    def __init__(
        self,
        contributions: bool,
        bound: bool,
        values_hook: bool = False,
        accumulate: torch.dtype = torch.float32,
    ) -> None:
        self.contributions, self.bound = contributions, bound
        self.values_hook, self.accumulate = values_hook, accumulate

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """Attention, and where asked for the stream around it."""
        wanted = ["attention"]
        if self.contributions:
            wanted += _AROUND
        if self.bound or self.contributions:
            wanted += _SPREADS
        if "ln1_post" not in dict(model.blocks[0].named_children()):
            wanted = [site for site in wanted if site != "attn_raw"]  # what it writes is the same
        if (self.contributions or self.bound) and self.values_hook:
            wanted.append("v")
        return tuple(dict.fromkeys(site for site in wanted if has_site(model, site)))

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """What is needed of one activation."""
        if look.site == "attention":
            return self._attention(activation, look)
        kept: dict[str, Tensor] = {}
        if look.site == "v" or (self.contributions and look.site in _AROUND):
            kept["whole"] = activation.clone()
        if look.site in _SPREADS:
            wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
            kept["spread"] = spread_of(wide)
            kept["sample"] = at_sample(wide, look.mask)
        return kept

    def _attention(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        if not isinstance(activation, AttentionCall):
            diagonal = activation.diagonal(dim1=-2, dim2=-1)
            return {"pattern": activation.clone(), "diagonal": diagonal.clone()}
        call = activation
        kept = {"q": call.q.clone(), "k": call.k.clone()}
        # The log-sum-exp is there only where a kernel gives it away; nothing is owed for its lack.
        kept |= attend(
            call,
            look.tokens,
            look.mask,
            statistics=("diagonal", "lse"),
            accumulate=self.accumulate,
        )
        if self.contributions or self.bound:
            assert call.output is not None
            kept["valued"] = at_sample(call.v.transpose(1, 2), look.mask)
            if self.contributions:
                kept["values"] = call.v.clone()
            kept["mixed"] = at_sample(call.output, look.mask).flatten(2)
        batch = call.q.shape[0]
        kept["scale"] = torch.full((batch,), call.scale, dtype=torch.float64)
        if call.softcap is not None:
            kept["softcap"] = torch.full((batch,), call.softcap, dtype=torch.float64)
        if call.start is not None:
            kept["start"] = call.start.expand(batch, -1)
        if call.sinks is not None:
            kept["sinks"] = call.sinks.expand(batch, -1)
        return kept

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> Trace:
        """The layers, in the memory where the pass left them."""

        def at(site: str, name: str, layer: int) -> Tensor | None:
            return observations.layers(site, name).get(layer)

        def either(site: str, instead: str, name: str, layer: int) -> Tensor | None:
            found = at(site, name, layer)
            return at(instead, name, layer) if found is None else found

        passed = {
            layer
            for name in ("q", "pattern")
            for layer in observations.layers("attention", name)
            if layer is not None
        }
        layers = {}
        for layer in sorted(passed):
            part = {
                name: at("attention", name, layer)
                for name in ("q", "k", "lse", "scale", "softcap", "start", "sinks", "values")
            }
            made = Layer(
                pattern=at("attention", "pattern", layer),
                diagonal=at("attention", "diagonal", layer),
                before=at("resid_pre", "whole", layer),
                raw=either("attn_raw", "attn_out", "whole", layer),
                write=at("attn_out", "whole", layer),
                spread_before=at("resid_pre", "spread", layer),
                spread_mid=at("resid_mid", "spread", layer),
                spread_after=at("resid_post", "spread", layer),
                spread_raw=either("attn_raw", "attn_out", "spread", layer),
                samples={
                    site: x for site in _SPREADS if (x := at(site, "sample", layer)) is not None
                },
                values=part["values"],
            )
            q, k, scale = part["q"], part["k"], part["scale"]
            if q is not None and k is not None and scale is not None:
                softcap, sinks = part["softcap"], part["sinks"]
                made.call = AttentionCall(
                    q,
                    k,
                    k,  # values are not mixed again
                    float(scale[0]),
                    None if softcap is None else float(softcap[0]),
                    part["start"],
                    None if sinks is None else sinks[0],
                )
                made.lse = part["lse"]
            elif (values := at("v", "whole", layer)) is not None and values.ndim == 4:
                made.values = rearrange(values, "b k g d -> b g k d")
            mixed, valued = (at("attention", name, layer) for name in ("mixed", "valued"))
            if mixed is not None and valued is not None:
                made.samples |= {"mixed": mixed, "values": valued}
            elif made.pattern is not None and made.values is not None:
                shared = made.heads // made.values.shape[1]
                values = made.values.repeat_interleave(shared, dim=1).to(made.pattern.dtype)
                mixed = rearrange(made.pattern @ values, "b h q d -> b q (h d)")
                made.samples["mixed"] = at_sample(mixed, sequences.mask)
                made.samples["values"] = at_sample(made.values.transpose(1, 2), sequences.mask)
            if "attn_out" in made.samples:
                made.samples.setdefault("attn_raw", made.samples["attn_out"])
            layers[layer] = made
        return Trace(layers, sequences, provenance)


def _moved(whole: Any, device: torch.device) -> dict[str, Any]:
    values = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    return {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}


def spread_of(stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 2"]:
    """Root mean square and standard deviation: what an RMSNorm or a LayerNorm divides by."""
    rms = stream.square().mean(dim=-1).sqrt()
    return torch.stack([rms, stream.std(dim=-1, correction=0)], dim=-1)


def sample_of(mask: Bool[Tensor, "batch position"]) -> Int[Tensor, "batch sample"]:
    """Positions where each text is sampled: all of a short one, else evenly spread to both ends."""
    last = mask.sum(dim=-1, keepdim=True) - 1
    steps = torch.linspace(0, 1, min(mask.shape[1], SAMPLE), dtype=torch.float64)
    return (steps.to(mask.device) * last).round().long()


def at_sample(
    stream: Float[Tensor, "batch position *rest"], mask: Bool[Tensor, "batch position"]
) -> Float[Tensor, "batch sample *rest"]:
    """A stream where each text is sampled."""
    batch = torch.arange(len(mask), device=stream.device)[:, None]
    return stream[batch, sample_of(mask).to(stream.device)]
