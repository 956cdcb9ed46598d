"""``eyechart.collapse_curve``: how far apart n and n + 1 repeated tokens are.

Under a causal mask the representation at a position depends on the tokens up to it and on no other.
For one token repeated, the prompt with n repetitions is a prefix of the prompt with n + 1, so its
last representation is simply an earlier position of the longest prompt: one forward pass serves
every n.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eyechart.errors import InputError, UsageError
from eyechart.models import check_structure
from eyechart.probes import Look, Observations, StreamProbe, capture
from eyechart.results import CollapseCurve, Provenance, Sequences
from eyechart.sequences import repeated

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT_PROMPT = "How many times does the digit 1 appear in the following sequence? Sequence: "
DEFAULT_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def collapse_curve(
    model: "TransformerBridge",
    family: Literal["repeat"] = "repeat",
    lengths: Sequence[int] | None = None,
    *,
    token: str = "1",
    prompt: str = DEFAULT_PROMPT,
    prepend_bos: bool | None = None,
) -> CollapseCurve:
    """Distance between the last token's representations after n and n + 1 repetitions, by layer.

    Barbero et al., arXiv 2406.04267, Theorem 4.2 and Figure 5. A prompt (or a beginning-of-sequence
    token) in front is what makes the question non-trivial: without either, models with rotary or no
    positions give every repetition the same representation, and the distance is zero from the
    start.

    Args:
        model: A TransformerBridge.
        family: ``"repeat"``: one token repeated.
        lengths: The n to measure; by default 1 to 500 on a logarithmic grid, as far as they fit.
        token: What is repeated; must be one token.
        prompt: Text in front.
        prepend_bos: See :func:`eyechart.sequences.prepare`.

    Returns:
        Distances ``[layer length]``: embedding, every block, and the final norm's output.

    Raises:
        UsageError: unknown family, or lengths that are not positive.
        InputError: a length does not fit the context, or ``token`` is several tokens.
        CaptureError, NonFiniteError, UnsupportedModelError: as :func:`eyechart.capture`.
    """
    if family != "repeat":
        raise UsageError(f"unknown family {family!r}; choose 'repeat'")
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise UsageError(f"lengths must be positive, got {list(lengths)}")
    check_structure(model)
    before = repeated(model, token, 1, prompt=prompt, prepend_bos=prepend_bos).lengths[0] - 1
    limit = model.cfg.n_ctx or max(lengths or DEFAULT_LENGTHS) + 1 + before
    room = limit - before - 1
    chosen = sorted(set(lengths or [n for n in DEFAULT_LENGTHS if n <= room]))
    if not chosen or chosen[-1] > room:
        raise InputError(
            f"n={chosen[-1] if chosen else 1} needs {before} tokens of prompt and n + 1 "
            f"repetitions, but {model.cfg.model_name} sees at most {limit}; "
            f"n can be at most {room}."
        )
    longest = repeated(model, token, chosen[-1] + 1, prompt=prompt, prepend_bos=prepend_bos)
    probe = LastTokenProbe(before, chosen, family)
    (result,) = capture(model, longest, [probe])
    return result


class LastTokenProbe(StreamProbe[CollapseCurve]):
    """Keeps the stream at the last repetition for every n and n + 1.

    Args:
        before: Tokens in front of the first repetition.
        lengths: The n to compare with n + 1, ascending.
        family: Name of what is repeated.
    """

    def __init__(self, before: int, lengths: Sequence[int], family: str) -> None:
        self.lengths, self.family = tuple(lengths), family
        last = torch.tensor(self.lengths) + before - 1
        self.positions = torch.stack([last, last + 1])

    def reduce(self, stream: Tensor, look: Look) -> Mapping[str, Tensor]:
        """The stream at the chosen positions."""
        return {"ends": stream[:, self.positions.to(stream.device)]}

    def result(
        self, observations: Observations, sequences: Sequences, provenance: Provenance
    ) -> CollapseCurve:
        """Distances of every pair at every layer."""
        ends = self.by_depth(observations, "ends")[0]
        labels = ["embedding", *(f"block {layer}" for layer in range(len(ends) - 1))]
        final = self.after_final_norm(observations, "ends")
        if final is not None:
            ends = torch.cat([ends, final])
            labels.append("final norm")
        return CollapseCurve(
            sequences=sequences,
            provenance=provenance,
            family=self.family,
            lengths=self.lengths,
            layer_labels=tuple(labels),
            **distances(ends[:, 0], ends[:, 1]),
        )


def distances(
    shorter: Float[Tensor, "layer length d_model"], longer: Float[Tensor, "layer length d_model"]
) -> dict[str, Float[Tensor, "layer length"]]:
    """L1, L2, L-infinity, relative (L1 over the longer prompt's L1 length) and cosine distance."""
    shorter, longer = shorter.double(), longer.double()
    difference = longer - shorter
    l1 = difference.abs().sum(dim=-1)
    cosine = 1 - torch.nn.functional.cosine_similarity(shorter, longer, dim=-1)
    measured = {
        "l1": l1,
        "l2": difference.norm(dim=-1),
        "linf": difference.abs().amax(dim=-1),
        # Two zero vectors are no distance apart.
        "relative": l1 / longer.abs().sum(dim=-1).clamp(min=torch.finfo(torch.double).tiny),
        "cosine": cosine.clamp(min=0),
    }
    return {name: value.float() for name, value in measured.items()}
