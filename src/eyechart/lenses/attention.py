"""Lenses on attention: tokens hidden from queries, heads left out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from eyechart.errors import UsageError
from eyechart.kernels import AttentionCall, replacements
from eyechart.lenses.seen import seen_through
from eyechart.models import facts_of, opened_with
from eyechart.probes.notes import noted
from eyechart.results import HeadCensus

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def evict(model: "TransformerBridge", keys: int = 4, after: int = 8) -> Iterator[None]:
    """Hide the first ``keys`` tokens from the queries from position ``after`` on.

    The way to take a sink away. Hiding the first token from every query is another experiment: the
    second token then is the first that anyone sees, and becomes the sink. Generation works without
    a cache of keys (``use_past_kv_cache=False``).

    Args:
        model: A TransformerBridge.
        keys: How many tokens at the start are hidden.
        after: First query that no longer sees them; at least ``keys``, so that every query sees
            itself.

    Raises:
        UsageError: ``keys`` is less than 1 or more than ``after``.
        UnsupportedModelError: attention of this model is not computed where it could be changed.
    """
    if not 0 < keys <= after:
        raise UsageError(f"keys must be between 1 and after, got keys={keys}, after={after}")

    note = f"seen through evict: {keys} keys hidden from query {after} on"
    with noted(model, note), first_keys_hidden(model, keys, after):
        yield


@contextmanager
def first_keys_hidden(model: "TransformerBridge", keys: int, after: int) -> Iterator[None]:
    """:func:`evict` without a note, for measurements that hide keys themselves and say so."""

    def hide(layer: int, call: AttentionCall) -> None:
        queries = torch.arange(call.length, device=call.q.device)
        first = torch.where(queries >= after, keys, 0).expand(call.q.shape[0], -1)
        call.start = first if call.start is None else torch.maximum(first, call.start)

    with seen_through(model, hide):
        yield


@contextmanager
def skip_heads(
    census: HeadCensus | Any,  # anything else gets an error that says what to give
    model: "TransformerBridge | None" = None,
    *,
    heads: Sequence[tuple[int, int, str]] | None = None,
) -> Iterator[None]:
    """Run the model without some heads: no score is computed for them.

    What takes their place is cheap: nothing, a constant, the first token's value or the token's
    own (:data:`eyechart.results.REPLACEMENTS`). Attention itself cannot be measured under this
    lens, because these heads have none; streams and logits can. Generation works without a cache
    of keys (``use_past_kv_cache=False``).

    Args:
        census: Which heads, and the constants that replace them.
        model: The model; by default every open one with the weights that the census was made on.
        heads: As ``(layer, head, replacement)``, such as ``census.no_ops()``; by default the set
            that the census found can go together.

    Raises:
        UsageError: the census is of another model, or none that fits it is open; a head is not
            there or its replacement unknown.
        UnsupportedModelError: attention of this model is not computed where it could be changed.
    """
    if not isinstance(census, HeadCensus):
        raise UsageError(
            f"expected a HeadCensus, got {type(census).__name__}: skip_heads(census, model)"
        )
    models = _models_of(census, model)
    if heads is None:
        if census.together is None:
            raise UsageError("this census has no set of heads that can go together; give heads=")
        heads = census.together.heads
    replaced = replacements(heads, census.trials.means)

    def skip(layer: int, call: AttentionCall) -> None:
        call.replaced |= replaced.get(layer, {})

    note = f"seen through skip_heads: {len(heads)} heads left out"
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(noted(each, note))
            stack.enter_context(seen_through(each, skip))
        yield


def _models_of(census: HeadCensus, model: "TransformerBridge | None") -> "list[TransformerBridge]":
    weights = census.provenance.weights
    if model is not None:
        if facts_of(model).weights != weights:
            raise UsageError(
                f"the census is of {census.provenance.model}, with other weights than "
                f"{facts_of(model).name} has here: its heads are not these."
            )
        return [model]
    found = opened_with(weights)
    if not found:
        raise UsageError(
            f"no open model has the weights that this census of {census.provenance.model} was made "
            "on; open it, or give the model: skip_heads(census, model)"
        )
    return found
