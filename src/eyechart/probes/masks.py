"""Which keys a query sees, in one number a query: the first of them.

Causal masks of language models let query i see the keys from some start_i up to i: all of them,
a sliding window, its chunk. The start says it all, where an explicit mask is n x n. A mask that is
not of this form is refused, never approximated.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_BLOCK = 2**22  # cells of a mask that exist at once


class IrregularMaskError(ValueError):
    """The keys a query sees are not one run that ends at the query."""


class Visible:
    """A mask as transformers' modelling code passes it on: opaque, and linear in length.

    Attributes:
        irregular: Why the mask cannot be said so; empty where it can. Masks are made before it is
            known which layers use them, if any, so this is for the layer to refuse.
    """

    def __init__(self, start: Int[Tensor, "batch query"] | None, irregular: str = "") -> None:
        self._start, self.irregular = start, irregular

    @property
    def start(self) -> Int[Tensor, "batch query"] | None:
        """First key each query sees, None where that is key 0 for all.

        Raises:
            IrregularMaskError: the mask is not of this form.
        """
        if self.irregular:
            raise IrregularMaskError(self.irregular)
        return self._start


def visible(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **options: object,
) -> Visible:
    """What transformers calls to make a mask, registered beside the attention function.

    The arguments are those of transformers' mask interface; what only says how a mask should be
    written down (dtype, shortcuts) is not used.
    """
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # there is no padding
    if mask_function is causal_mask_function and attention_mask is None:
        return Visible(None)
    if q_offset or kv_offset or q_length != kv_length:
        return Visible(None, "the mask is that of a continued sequence")
    step = max(1, _BLOCK // (batch_size * kv_length))
    starts = []
    for begin in range(0, q_length, step):
        rows = sdpa_mask(
            batch_size=batch_size,
            q_length=min(step, q_length - begin),
            kv_length=kv_length,
            q_offset=begin,
            kv_offset=0,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert rows is not None
        try:
            starts.append(starts_of(rows[:, 0], begin))
        except IrregularMaskError as problem:
            return Visible(None, str(problem))
    start = torch.cat(starts, dim=1)
    return Visible(start if bool(start.any()) else None)


def starts_of(rows: Bool[Tensor, "batch query key"], begin: int) -> Int[Tensor, "batch query"]:
    """The first key of each query, from explicit rows of a mask (True: visible).

    Raises:
        IrregularMaskError: what a query sees is not one run of keys that ends at the query.
    """
    at = torch.arange(begin, begin + rows.shape[1], device=rows.device)
    start = rows.int().argmax(dim=-1)
    keys = torch.arange(rows.shape[-1], device=rows.device)
    run = (keys >= start[..., None]) & (keys <= at[:, None])
    if not bool((rows == run).all()):
        raise IrregularMaskError("what a query sees is not one run of keys that ends at itself")
    return start.int()
