"""The model run on from one of its layers, with what heads write there exchanged.

What lies before the layer is the same in every run, so it is not computed again: the blocks before
hand on what they are given, and the layer gets the stream that one reference pass left there. Many
exchanges in one layer go through the rest of the model as one batch.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import NonFiniteError
from eyechart.kernels import AttentionCall, attend
from eyechart.models import facts_of
from eyechart.probes import Look, Observations, Probe, capture, has_site, hook_names
from eyechart.probes.forward import thrift
from eyechart.probes.plan import fusable
from eyechart.probes.seam import edits_of, set_entry, taken_over
from eyechart.results import Provenance, Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Exchange = Callable[[Tensor, Tensor | None], None]
"""Changes mixtures of values ``[row position head d_value]`` in place, given the values
``[row position kv_head d_value]`` they are of (None where a layer does not show them)."""

_TRIED = 1e-3  # nats of KL, by far more than rounding, by far less than a wrong stream


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """What every head wrote in the reference pass.

    Attributes:
        stream: Into each block.
        mixed: Each head's mixture of values.
        values: The values, None where a layer does not show what it mixes.
        provenance: Of the pass.
    """

    stream: dict[int, Float[Tensor, "text position d_model"]]
    mixed: dict[int, Float[Tensor, "text position head d_value"]]
    values: dict[int, Float[Tensor, "text position kv_head d_value"] | None]
    provenance: Provenance


class OutputsProbe(Probe[HeadOutputs]):
    """Keeps :class:`HeadOutputs`.

    Args:
        by_pattern: Layers that are read by their pattern, whose mixtures come from a hook.
    """

    def __init__(self, by_pattern: Sequence[int]) -> None:
        self.by_pattern = frozenset(by_pattern)

    def sites(self, model: "TransformerBridge") -> Sequence[str]:
        """Attention and the stream; mixtures and values by their hooks where there is need."""
        hooks = ("z", "v") if self.by_pattern else ()
        return ("resid_pre", "attention", *(site for site in hooks if has_site(model, site)))

    def observe(self, activation: Any, look: Look) -> Mapping[str, Tensor]:
        """The whole of it: texts are short."""
        if isinstance(activation, AttentionCall):
            attend(activation, look.tokens, look.mask)
            assert activation.output is not None
            values = rearrange(activation.v, "b k p d -> b p k d")
            return {"mixed": activation.output.clone(), "values": values.clone()}
        if look.site == "resid_pre" or (look.site in "zv" and look.layer in self.by_pattern):
            return {"whole": activation.clone()}
        return {}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> HeadOutputs:
        """By layer."""
        mixed = observations.layers("attention", "mixed") | observations.layers("z", "whole")
        values = _by_block(
            observations.layers("attention", "values") | observations.layers("v", "whole")
        )
        told = {layer: mix for layer, mix in _by_block(mixed).items() if mix.ndim == 4}
        return HeadOutputs(
            _by_block(observations.layers("resid_pre", "whole")),
            told,
            {
                layer: _shown(values.get(layer), mix) if layer in self.by_pattern else values[layer]
                for layer, mix in told.items()
            },
            provenance,
        )


class Onward:
    """Runs of one model on equally long texts.

    Args:
        model: A TransformerBridge.
        texts: The texts, without padding.
        positions: Whose next-token logits are wanted.
        batch_size: Texts in the reference pass.

    Attributes:
        outputs: What every head wrote in the reference pass.
        layers: Blocks whose heads can be exchanged.
        shares: Whether runs start at their layer; False where this model cannot do that.
        positions: Whose logits are had.
        passes: What all runs so far amount to, in passes of all texts through all blocks.
        runs: Forward passes so far.
    """

    def __init__(
        self,
        model: "TransformerBridge",
        texts: Sequences,
        positions: Sequence[int],
        batch_size: int | None = None,
    ) -> None:
        facts = facts_of(model)
        self.model, self.texts, self.facts = model, texts, facts
        fused, reasons = fusable(model, facts, ())
        self._fused, self._unfused = sorted(fused), sorted(reasons)
        (self.outputs,) = capture(
            model, texts, [OutputsProbe(self._unfused)], batch_size=batch_size
        )
        self.layers = sorted(self.outputs.mixed)
        self._tokens = texts.tokens.to(facts.device)
        self.positions = tuple(positions)
        self._at = torch.tensor(self.positions, device=facts.device)
        self._forms: dict[int, int] = {}
        self.passes, self.runs = 0.0, 0
        self.shares = False
        self.reference: Float[Tensor, "text position vocabulary"] = self._rehearse()

    def logits(
        self, layer: int, exchanges: Mapping[int, Exchange], copies: int = 1
    ) -> Float[Tensor, "row position vocabulary"]:
        """Next-token logits of ``copies`` runs, one after the other along the rows.

        Args:
            layer: Where the runs begin; no exchange may be before it.
            exchanges: What is done to each layer's mixtures.
            copies: How many runs go through together.

        Raises:
            NonFiniteError: NaN or infinity came of it.
        """
        first = layer if self.shares else 0
        rows = self._tokens.repeat(copies, 1)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if first:
                stack.enter_context(self._started(first, copies))
            stack.enter_context(self._exchanged(first, exchanges, rows))
            found = self._run(rows)
        self.runs += 1
        self.passes += copies * (1 - first / self.facts.n_layers)
        if not bool(found.sum(dtype=torch.promote_types(found.dtype, torch.float32)).isfinite()):
            raise NonFiniteError(
                f"layer {layer} of {self.facts.name}: replacing a head there gives NaN or infinity "
                "among the logits. Load the model in float32."
            )
        return found

    def _run(self, rows: Tensor) -> Tensor:
        options = thrift(self.model, logits=True)
        accepted = inspect.signature(type(self.model.original_model).forward).parameters
        if "logits_to_keep" in accepted:
            found = self.model(rows, return_type="logits", **options, logits_to_keep=self._at)
            if found.shape[1] == len(self.positions):
                return found
        return self.model(rows, return_type="logits", **options)[:, self._at]

    def _rehearse(self) -> Tensor:
        """The reference logits; and finds out whether runs may start later than the embedding."""
        forms: dict[int, int | None] = {}

        def note(layer: int) -> Callable[..., None]:
            def look(module: Any, inputs: Any, output: Any) -> None:
                forms[layer] = _form(output)

            return look

        blocks = range(self.facts.n_layers)
        handles = [self.model.blocks[l].register_forward_hook(note(l)) for l in blocks]
        try:
            reference = self.logits(0, {})
        finally:
            for handle in handles:
                handle.remove()
        self._forms = {layer: form for layer, form in forms.items() if form is not None}
        last = self.facts.n_layers - 1
        if len(self._forms) == len(blocks) == len(self.outputs.stream):
            self.shares = True
            try:
                for layer in {last // 2, last}:
                    moved = self.logits(layer, {}).double().log_softmax(dim=-1)
                    truth = reference.double().log_softmax(dim=-1)
                    kl = (truth.exp() * (truth - moved)).sum(dim=-1)
                    self.shares &= bool((kl < _TRIED).all())
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
                self.shares = False  # a block that wants more than the stream from those before
        return reference

    @contextmanager
    def _started(self, layer: int, copies: int) -> Iterator[None]:
        """Blocks before ``layer`` hand on what they get; it gets the reference pass's stream."""
        stream = self.outputs.stream[layer].to(self.facts.device).repeat(copies, 1, 1)

        def begin(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            if args:
                return (stream.to(args[0]), *args[1:]), given
            return args, {**given, "hidden_states": stream.to(given["hidden_states"])}

        with ExitStack() as undo:
            for before in range(layer):
                block = self.model.blocks[before]
                set_entry(undo, block, "forward", _hand_on(self._forms[before]))
            block = self.model.blocks[layer]
            handle = block.register_forward_pre_hook(begin, with_kwargs=True)
            undo.callback(handle.remove)
            yield

    @contextmanager
    def _exchanged(
        self, first: int, exchanges: Mapping[int, Exchange], rows: Tensor
    ) -> Iterator[None]:
        real = torch.ones_like(rows, dtype=torch.bool)

        def handle(layer: int, call: AttentionCall) -> Tensor:
            for edit in edits_of(self.model):
                edit(layer, call)
            attend(call, rows.to(call.q.device), real.to(call.q.device))
            assert call.output is not None
            if layer in exchanges:
                exchanges[layer](call.output, rearrange(call.v, "b k p d -> b p k d"))
            return call.output

        hooks = [h for l in self._unfused if l in exchanges for h in self._hooks(l, exchanges[l])]
        taken = [layer for layer in self._fused if layer >= first]
        with (
            self.model.hooks(fwd_hooks=hooks),
            taken_over(self.model, taken, not self._unfused, handle),
        ):
            yield

    def _hooks(self, layer: int, exchange: Exchange) -> list[tuple[str, Callable[..., Any]]]:
        values: list[Tensor] = []

        def keep(v: Tensor, hook: Any) -> None:
            values.append(v)

        def change(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            shown = self.outputs.values[layer] is not None
            exchange(z, values.pop() if shown else None)
            return z

        found: list[tuple[str, Callable[..., Any]]] = []
        if self.outputs.values[layer] is not None:
            found.append((hook_names(self.model, "v")[layer], keep))
        return [*found, (hook_names(self.model, "z")[layer], change)]


def own_values(
    mixed: Float[Tensor, "row position head d_value"],
    values: Float[Tensor, "row position kv_head d_value"] | None,
    head: int,
) -> Float[Tensor, "row position d_value"]:
    """The values that a head mixes: those of its group.

    Where a layer does not show them, what the head mixed; then only what needs no values, or the
    first token's alone, which is its own mixture, may be made of it.
    """
    if values is None:
        return mixed[:, :, head]
    return values[:, :, head // (mixed.shape[2] // values.shape[2])]


def _by_block(kept: Mapping[int | None, Tensor]) -> dict[int, Tensor]:
    return {layer: value for layer, value in sorted(kept.items()) if layer is not None}


def _shown(values: Tensor | None, mixed: Tensor) -> Tensor | None:
    """A hook's values, if they are what heads mix: the first token's mixture is its own value."""
    if values is None or values.ndim != 4 or values.shape[-1] != mixed.shape[-1]:
        return None
    shared = mixed.shape[2] // values.shape[2]
    own = values[:, 0].repeat_interleave(shared, dim=1)
    near = (mixed[:, 0] - own).norm() <= 0.02 * own.norm()
    return values if bool(near) else None


def _form(output: Any) -> int | None:
    """Length of the tuple a block returns, 0 for a bare stream; None for anything else."""
    if isinstance(output, Tensor):
        return 0
    there = isinstance(output, tuple) and output and isinstance(output[0], Tensor)
    return len(output) if there else None


def _hand_on(form: int) -> Callable[..., Any]:
    def forward(*args: Any, **given: Any) -> Any:
        stream = args[0] if args else given["hidden_states"]
        return (stream, *[None] * (form - 1)) if form else stream

    return forward
