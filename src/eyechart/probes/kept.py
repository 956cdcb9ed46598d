"""What probes keep of a pass: one quantity of all layers in one piece of memory.

Small tensors strewn between the activations of a long pass would keep the allocator from giving the
activations' memory back; and stacked as they come, they need not be stacked again.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from eyechart.errors import CaptureError

# Larger values have memory of their own that goes back as a whole; and a probe that wants one layer
# of something large must not be given room for all.
_LARGE = 2**24


class Shelf:
    """One quantity of one site, by layer, on the CPU.

    Args:
        places: How many layers there may be.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._room: Tensor | None = None  # [batch layer ...], filled in the order of layers
        self._shelved: list[int | None] = []
        self._loose: dict[int | None, Tensor] = {}

    def put(self, layer: int | None, value: Tensor) -> None:
        """Keep a layer's value, batch first."""
        value = value.detach()
        if self._room is None and not self._loose and value.nbytes < _LARGE:
            batch, *rest = value.shape
            self._room = value.new_empty((batch, self.places, *rest), device="cpu")
        # A place passed twice is refused after the pass; until then it must be kept somehow.
        room_left = len(self._shelved) < self.places
        if self._room is not None and room_left and _alike(self._room[:, 0], value):
            self._room[:, len(self._shelved)].copy_(value)
            self._shelved.append(layer)
        else:
            self._loose[layer] = value.cpu()

    def layers(self) -> dict[int | None, Tensor]:
        """Layer to value; views of the shelf, not copies."""
        if self._room is None:
            return dict(self._loose)
        return {layer: self._room[:, i] for i, layer in enumerate(self._shelved)} | self._loose

    def stack(self, order: Sequence[int | None]) -> Tensor | None:
        """``[batch layer ...]`` if that is how it lies here, without a copy."""
        if self._room is None or self._loose or list(order) != self._shelved:
            return None
        return self._room[:, : len(self._shelved)]


def joined(shelves: Sequence[Shelf]) -> Shelf:
    """The shelves of several passes as one, batch after batch."""
    if len(shelves) == 1:
        return shelves[0]
    whole = Shelf(shelves[0].places)
    parts = [shelf.layers() for shelf in shelves]
    for layer in parts[0]:
        whole.put(layer, torch.cat([part[layer] for part in parts]))
    return whole


class Observations:
    """What a probe kept, over all layers and sequences.

    Attributes:
        fused: Layers whose attention was computed without its pattern.
        reasons: Of the layers that were wanted so and could not be, why.
    """

    def __init__(
        self,
        kept: Mapping[tuple[str, str], Shelf],
        fused: Collection[int] = (),
        reasons: Mapping[int, str] | None = None,
    ) -> None:
        self._kept, self.fused, self.reasons = kept, frozenset(fused), dict(reasons or {})

    def layers(self, site: str, name: str) -> dict[int | None, Tensor]:
        """One quantity of one site by layer; empty where nothing was kept."""
        shelf = self._kept.get((site, name))
        return {} if shelf is None else shelf.layers()

    def one(self, site: str, name: str) -> Tensor:
        """A quantity that was kept at one place only."""
        (value,) = self.layers(site, name).values()
        return value

    def stack(self, site: str, name: str, n_layers: int | None = None) -> Tensor:
        """One quantity ``[batch layer ...]``; with ``n_layers``, blocks without it are NaN.

        Raises:
            CaptureError: layers disagree on its shape.
        """
        kept = self.layers(site, name)
        order = sorted(kept, key=lambda layer: -1 if layer is None else layer)
        places = order if n_layers is None else list(range(n_layers))
        whole = self._kept[site, name].stack(places)
        if whole is not None:
            return whole
        shapes = {tuple(value.shape) for value in kept.values()}
        if len(shapes) != 1:
            raise CaptureError(
                f"{name} at {site} has {len(shapes)} shapes over the layers ({shapes}); models "
                "whose layers differ in size cannot be stacked."
            )
        some = next(iter(kept.values()))
        missing = torch.full_like(some, torch.nan) if len(kept) < len(places) else some
        return torch.stack([kept.get(place, missing) for place in places], dim=1)


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype
