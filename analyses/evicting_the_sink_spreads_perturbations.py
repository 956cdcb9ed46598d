"""Does a changed word travel further when later tokens cannot rest on the first ones?

One token in the middle of every text is replaced, and every later token's residual stream is
compared with and without the change, layer by layer: once as the model is, once with the first
tokens hidden. Hidden from later queries only: hidden from all, the next token would become the
first and take over as the sink. The plain way does it with TransformerLens hooks on the attention
scores, and its largest disagreement with ``information_flow`` is part of the verdict. So is the
control: as many tokens hidden that are not the first, because a model that is hindered anyhow might
be shaken more easily.
"""

import pandas as pd
import torch
from frame import Claim, Finding, line_a_text, main, require
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

import eyechart
from eyechart.models import facts_of
from eyechart.sequences import prepare
from eyechart.texts import DOMAINS, TEXTS

CLAIM = Claim(
    statement=(
        "A change of one token moves later tokens further, in the later half of the layers, when "
        "the first four tokens are hidden from later queries."
    ),
    source="Barbero et al., arXiv 2504.02732, the change of one token with and without the sink",
    holds_if=(
        "the mean over texts of the logarithm of the ratio, evicted over intact, of the mean "
        "relative change of later tokens in the later half of the layers has a 95% bootstrap "
        "interval above 0, so has its difference from the control, and information_flow agrees "
        "with plain hooks"
    ),
)


def by_hooks(
    model: TransformerBridge,
    tokens: Int[Tensor, "1 position"],
    change: tuple[int, int],
    keys: range = range(0),
    queries: int = 0,
) -> Float[Tensor, "stream position"]:
    """Relative L2 distance every layer and position moves, keys hidden from some query on."""
    position, token = change
    changed = tokens.clone()
    changed[0, position] = token
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]

    def hide(scores: Float[Tensor, "batch head query key"], hook: object) -> Tensor:
        scores = scores.clone()
        scores[:, :, queries:, keys.start : keys.stop] = torch.finfo(scores.dtype).min
        return scores

    layers = facts_of(model).attention_layers if keys else ()
    hidden = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in layers]
    streams = []
    for ids in (tokens, changed):
        with torch.no_grad(), model.hooks(fwd_hooks=hidden):
            _, cache = model.run_with_cache(
                ids.to(model.cfg.device), return_type=None, names_filter=names
            )
        streams.append(torch.stack([cache[name][0].double().cpu() for name in names]))
    before, after = streams
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


def measure(model: TransformerBridge, seed: int) -> Finding:
    """Every text through the library, the first one through hooks as well."""
    flow = eyechart.information_flow(model, list(TEXTS.values()), measures=("spread",), seed=seed)
    require(flow, "spread", "spread_evicted")
    intact, without, changes = flow.spread, flow.spread_evicted, flow.spread_change
    assert intact is not None and without is not None
    assert changes is not None and flow.evicted is not None
    count, queries = flow.evicted
    rows, logs, apart = [], [], []
    for row, (text, last) in enumerate(zip(TEXTS, flow.query.tolist(), strict=True)):
        tokens = prepare(model, TEXTS[text]).tokens
        where, token = changes[row].tolist()
        change, length = (where, token), last + 1
        if row == 0:
            for found, plain in (
                (intact, by_hooks(model, tokens, change)),
                (without, by_hooks(model, tokens, change, range(count), queries)),
            ):
                change_found, change_plain = (x[1:, where:length] for x in (found[row], plain))
                # Beyond the reach of a convolution nothing moves at all.
                size = change_plain.clamp(min=1e-6)
                apart.append(((change_found - change_plain).abs() / size).max())
        others = range(count, 2 * count)
        control = by_hooks(model, tokens, change, others, queries + count)
        spreads = (intact[row], without[row], control)
        # Entry 0 is the embedding, where no later token has moved yet.
        usual, *others_hidden = (
            spread[1:, where + 1 : length].double().mean(dim=-1) for spread in spreads
        )
        ratios = torch.stack([hidden / usual for hidden in others_hidden])
        logs.append(ratios.log())
        rows += [
            {
                "text": text,
                "domain": DOMAINS[text],
                "changed position": where,
                "layer": layer,
                "change": moved,
                "ratio": ratio,
                "ratio of the control": of_control,
            }
            for layer, (moved, ratio, of_control) in enumerate(
                zip(usual.tolist(), *ratios.tolist(), strict=True)
            )
        ]
    data = pd.DataFrame(rows)
    disagreement = float(torch.stack(apart).max())
    log_ratios = torch.stack(logs, dim=1)
    late, late_control = log_ratios[..., model.cfg.n_layers // 2 :].mean(dim=-1)
    generator = derive_generator(seed, "texts")
    low, high = bootstrap_ci(late, generator=generator)
    low_difference, _ = bootstrap_ci(late - late_control, generator=generator)
    mean, mean_control = log_ratios.mean(dim=1).exp().tolist()
    thick = {"mean over texts": mean, "control": mean_control}
    figure = line_a_text(data, "layer", "ratio", thick)
    figure.update_yaxes(type="log")
    return Finding(
        holds=float(low) > 0 and float(low_difference) > 0 and disagreement < 0.01,
        numbers={
            "ratio in the later half of the layers, geometric mean": float(late.mean().exp()),
            "its lower 95% limit over texts": float(low.exp()),
            "its upper 95% limit over texts": float(high.exp()),
            "median over texts": float(late.exp().median()),
            "geometric mean of the control": float(late_control.mean().exp()),
            "ratio over the control's, lower 95% limit": float(low_difference.exp()),
            f"share of {len(TEXTS)} texts where it exceeds 1": float((late > 0).double().mean()),
            "largest relative disagreement with plain hooks": disagreement,
        },
        data=data,
        figure=figure,
    )


if __name__ == "__main__":
    main(CLAIM, measure)
