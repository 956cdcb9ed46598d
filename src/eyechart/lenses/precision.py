"""A lens on precision: parts of a model in a coarser number format."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eyechart.errors import CaptureError, UnsupportedModelError, UsageError
from eyechart.kernels import AttentionCall
from eyechart.lenses.seen import seen_through
from eyechart.lenses.weights import recast, rounded, with_weights
from eyechart.models import check_structure
from eyechart.precision import Format, format_named
from eyechart.probes import Record, capture, hook_names
from eyechart.probes.notes import noted

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PLACES = ("model", "weights", "attention", "stream", "final")
"""What of a model can be put in another number format."""


@contextmanager
def precision(
    model: "TransformerBridge",
    format: str | torch.dtype | Format,
    at: str | Sequence[str] = "stream",
) -> Iterator[None]:
    """Run the model with parts of it rounded to a number format, or in that format altogether.

    Except at "model" the numbers are rounded and what follows is computed in the model's own
    format, so that the loss is that of the chosen parts alone. This is rounding of a model that was
    not trained for it: a ladder of precisions to examine it on, no way to deploy it.

    Args:
        model: A TransformerBridge.
        format: A name of :data:`eyechart.precision.FORMATS`, a usual short name or torch's.
        at: One or several of

            * "stream": the residual stream, each time it enters a block and before the final norm;
              formats with a scale take one a token. What is measured of the stream is the rounded.
              Massive activations may exceed a format's largest number, and are clamped to it.
            * "final": the final norm's output.
            * "attention": attention probabilities after the softmax; rows are not made to sum to 1
              again. int8 and int4 take one scale a row, ternary the mean over the keys that the
              query sees. Generation works without a cache of keys (``use_past_kv_cache=False``).
            * "weights": in floating formats every parameter. In int8, int4 and ternary the matrices
              of linear layers inside the blocks, with one scale an output (int8, int4) or a matrix
              (ternary), as in BitNet b1.58; embeddings, norms, biases and the head stay.
            * "model": all parameters cast to float64, float32, float16 or bfloat16 and the model
              run in it, as if it had been loaded so.

            Changes made to parameters under "weights" and "model" are lost on leaving.

    Raises:
        UsageError: unknown format or place; "model" in a format that no model is run in.
        UnsupportedModelError: the model keeps what should be rounded where it cannot be.
        InputError: the model is in training mode; "stream" and "final" are tried on entering.
    """
    chosen = format_named(format)
    places = (at,) if isinstance(at, str) else tuple(at)
    if not places or set(places) - set(PLACES):
        raise UsageError(f"at must be one or several of {', '.join(PLACES)}, got {at!r}")
    lenses = {
        "model": lambda: with_weights(model, recast(model, chosen)),
        "weights": lambda: with_weights(model, rounded(model, chosen)),
        "attention": lambda: _attention(model, chosen),
        "stream": lambda: _stream(model, chosen),
        "final": lambda: _hooked(model, {"final_norm": None}, chosen),
    }
    check_structure(model)
    with ExitStack() as stack:
        # The weights first: what else is checked on entering is checked with them.
        for place in PLACES:
            if place in places:
                stack.enter_context(lenses[place]())
        stack.enter_context(noted(model, _note(model, chosen, places)))
        yield


def _note(model: "TransformerBridge", format: Format, places: Sequence[str]) -> str:
    weight = next(model.parameters())
    own = str(weight.dtype).removeprefix("torch.")
    said = []
    if set(places) != {"model"}:
        said.append(f"emulated: rounded, computed in {own}")
    elif emulated := format.emulated(weight.device):
        said.append(emulated)
    there = f"seen through precision: {format.name} at {', '.join(places)}"
    return f"{there} ({'; '.join(said)})" if said else there


def _attention(model: "TransformerBridge", format: Format) -> AbstractContextManager[None]:
    def round_rows(
        before: Callable[[Tensor, Tensor], Tensor] | None, rows: Tensor, seen: Tensor
    ) -> Tensor:
        if before is not None:  # a lens within a lens
            rows = before(rows, seen)
        return format.round(rows, format.scale(rows.detach(), seen))

    def edit(layer: int, call: AttentionCall) -> None:
        call.rounded = partial(round_rows, call.rounded)

    return seen_through(model, edit)


@contextmanager
def _stream(model: "TransformerBridge", format: Format) -> Iterator[None]:
    # Out of each block rather than into the next, so that probes of the stream see it rounded.
    with _hooked(model, {"resid_pre": 0, "resid_post": None}, format) as seen:
        before, after = seen
        for layer in after:
            if layer and not torch.equal(before[layer], after[layer - 1]):
                raise UnsupportedModelError(
                    f"the stream of {model.cfg.model_name} cannot be rounded: what enters block "
                    f"{layer} is not what left block {layer - 1}."
                )
        yield


@contextmanager
def _hooked(
    model: "TransformerBridge", sites: dict[str, int | None], format: Format
) -> Iterator[tuple[dict[int | None, Tensor], ...]]:
    """Round what passes these sites, of one layer or of all; a short pass shows that it is passed.

    Plain torch hooks, which TransformerLens's own resets leave alone.
    """

    def round_it(module: nn.Module, inputs: object, x: Tensor) -> Tensor:
        return format.round(x)

    with ExitStack() as stack:
        try:
            for site, layer in sites.items():
                for at, name in hook_names(model, site).items():
                    if layer in (None, at):
                        point = model.hook_dict[name]
                        stack.callback(point.register_forward_hook(round_it).remove)
            seen = capture(model, torch.tensor([[0, 1]]), [Record(site) for site in sites])
        except CaptureError as problem:
            raise UnsupportedModelError(f"cannot be rounded: {problem}") from problem
        yield seen
