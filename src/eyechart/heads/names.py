"""What every head looks at: scores on texts and on random tokens, against chance."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.attention import attention_statistics
from eyechart.results import AttentionStatistics, HeadNames, Provenance, Sequences
from eyechart.results.head_names import evidence
from eyechart.sequences import from_ids
from eyechart.targets import AfterEarlierCopies, EarlierCopies, Target, Window, mass_on

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WINDOW = 16
REPEATS = 8
REPEATED = 32

_ONCE_IN_A_THOUSAND = 3.09  # standard deviations
_BLOCK = 256  # queries whose keys are counted at once


def named(
    model: "TransformerBridge",
    texts: Sequences,
    domains: tuple[str, ...],
    share: float,
    batch_size: int | None,
    seed: int,
) -> tuple[HeadNames, tuple[Provenance, ...]]:
    """Score every head.

    Args:
        model: A TransformerBridge.
        texts: Texts of one length.
        domains: Of each text.
        share: Evidence from which a head is named.
        batch_size: Sequences a pass.
        seed: Of the random tokens and the bootstrap.
    """
    length = texts.tokens.shape[1]
    # So narrow that much of the text is outside.
    window = Window(max(2, min(WINDOW, length // 4)))
    copies: tuple[Target, ...] = (EarlierCopies(), AfterEarlierCopies())
    names = ("duplicate", "induction")
    on_texts = attention_statistics(
        model,
        texts,
        statistics=("first", "diagonal", "previous", "entropy", "largest"),
        targets=[window, *copies],
        batch_size=batch_size,
    )
    said_twice = repeats(model, texts, seed)
    on_repeats = attention_statistics(
        model, said_twice, statistics=("largest",), targets=copies, batch_size=batch_size
    )
    queries = torch.arange(length)
    one = torch.ones(texts.tokens.shape)
    masses = {
        "sink": (on_texts, on_texts.first, one),
        "diagonal": (on_texts, on_texts.diagonal, one),
        "previous": (on_texts, on_texts.previous, one * (queries > 0)),
        "local": (on_texts, on_texts.masses[window.name], count(window, texts.tokens)),
        **{
            name: (on_repeats, on_repeats.masses[target.name], count(target, said_twice.tokens))
            for name, target in zip(names, copies, strict=True)
        },
    }
    scores = {name: values.mean(dim=-1) for name, (_, values, _) in masses.items()}
    chance, ceiling, shuffled = {}, {}, {}
    for name, (found, _, keys) in masses.items():
        visible = torch.arange(1, keys.shape[1] + 1)
        chance[name] = float((keys / visible).mean())
        ceiling[name] = float((keys > 0).float().mean())
        shuffled[name] = chance[name] + _ONCE_IN_A_THOUSAND * _spread_when_shuffled(found, keys)
    scores["uniform"] = (on_texts.entropy.exp() / (queries + 1)).mean(dim=-1)
    chance["uniform"], ceiling["uniform"] = float((1 / (queries + 1)).mean()), 1.0
    shuffled["uniform"] = torch.full_like(scores["uniform"][0], torch.nan)
    intervals = {
        name: interval(evidence(x, chance[name], ceiling[name]), seed) for name, x in scores.items()
    }
    return HeadNames(
        length=length,
        domains=domains,
        window=window.width,
        share=share,
        scores=scores,
        in_text={
            name: on_texts.masses[target.name].mean(dim=-1)
            for name, target in zip(names, copies, strict=True)
        },
        chance=chance,
        ceiling=ceiling,
        shuffled=shuffled,
        low={name: low for name, (low, _) in intervals.items()},
        high={name: high for name, (_, high) in intervals.items()},
        smallest_diagonal=on_texts.diagonal.amin(dim=(0, 3)),
        smallest_previous=on_texts.previous[..., 1:].amin(dim=(0, 3)),
    ), (on_texts.provenance, on_repeats.provenance)


def repeats(model: "TransformerBridge", texts: Sequences, seed: int) -> Sequences:
    """Random tokens, said twice; after the token that the texts begin with, if it is one."""
    tokenizer = getattr(model, "tokenizer", None)
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    plain = torch.tensor([i for i in range(int(model.cfg.d_vocab)) if i not in special])
    firsts = texts.tokens[:, 0].unique().tolist()
    alike = texts.prepend_bos is not False and len(firsts) == 1 and len(texts.tokens) > 1
    front = firsts if texts.prepend_bos or alike else []
    room = (int(model.cfg.n_ctx or 2 * REPEATED + 1) - len(front)) // 2
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(REPEATS):
        # Without replacement where there are enough: a token has one earlier copy, no more.
        order = torch.randperm(len(plain), generator=draw)[: min(REPEATED, room)]
        once = plain[order].tolist()
        rows.append([*front, *once, *once])
    return from_ids(model, rows, prepend_bos=texts.prepend_bos, name="random tokens said twice")


def count(target: Target, tokens: Int[Tensor, "text key"]) -> Float[Tensor, "text query"]:
    """How many of the keys that each query sees belong to a target."""
    length, found = tokens.shape[1], []
    for begin in range(0, length, _BLOCK):
        end = min(begin + _BLOCK, length)
        seen = torch.ones(end - begin, end).tril(begin).expand(len(tokens), 1, -1, -1)
        found.append(mass_on(seen, target, tokens[:, :end], begin)[:, 0])
    return torch.cat(found, dim=-1)


def interval(
    units: Float[Tensor, "unit layer head"], seed: int
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """95% interval of the mean by bootstrap over units."""
    from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

    draw = derive_generator(seed, "heads")
    return bootstrap_ci(units, dim=0, generator=draw)


def _spread_when_shuffled(
    found: AttentionStatistics, keys: Float[Tensor, "text query"]
) -> Float[Tensor, "layer head"]:
    """Standard deviation, from above, of a mean score if each query's keys were shuffled.

    A sum of t out of m masses drawn without replacement has the variance
    t (m - t) / (m - 1) (sum a^2 / m - 1 / m^2), and no row's sum a^2 exceeds its largest a.
    """
    visible = torch.arange(1, keys.shape[1] + 1)
    ways = keys * (visible - keys) / (visible - 1).clamp(min=1)
    spread = (found.largest / visible - 1 / visible**2).clamp(min=0)
    variance = (ways[:, None, None] * spread).sum(dim=(0, 3))
    return variance.sqrt() / keys.numel()
