"""Information flow by intervention, sinks, refusals: against plain runs of transformers."""

import math
from typing import Any

import pytest
import torch
from families import additive_mask, beside_plain
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.ao.quantization.qconfig import default_dynamic_qconfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import eyechart
from eyechart import Record
from eyechart.errors import EyechartError, InputError, NonFiniteError, UnsupportedModelError
from eyechart.errors import UsageError as Usage
from eyechart.flow import MEASURES, information_flow
from eyechart.models import CATALOGUE
from eyechart.probes import has_site
from eyechart.results import InformationFlow
from eyechart.results.flow import CHEAP, TRUTHS

LENGTHS = (22, 14)  # longer than the windows; an odd number of others than the first
ROWS = [torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def pair(request: Any) -> Any:
    """A bridge, and transformers' own eager model of the same weights."""
    return beside_plain(request.param)


@pytest.fixture(scope="module")
def sharp() -> Any:
    """A Llama with grouped queries, and transformers' own."""
    return beside_plain("llama")


def padded(model: Any, rows: list[Tensor] = ROWS) -> Any:
    return eyechart.sequences.from_ids(model, [row.tolist() for row in rows])


def measured(model: Any, *measures: str, inputs: Any = None, **options: Any) -> InformationFlow:
    inputs = padded(model) if inputs is None else inputs
    found = information_flow(model, inputs, measures=measures, **options)
    assert not found.unavailable
    return found


def plain_run(plain: Any, row: Tensor, mask: Any = None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of transformers' own model: stream by depth, the final norm's output, logits."""
    norm = plain.base_model.ln_f if hasattr(plain.base_model, "ln_f") else plain.base_model.norm
    last: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    options = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        out = plain(row[None], output_hidden_states=True, **options)
    handle.remove()
    # The last of transformers' states is taken after the final norm.
    streams = [state[0] for state in (*out.hidden_states[:-1], last[0])]
    return streams, out.hidden_states[-1][0], out.logits[0]


def swapped(row: Tensor, at: int, token: int) -> Tensor:
    changed = row.clone()
    changed[at] = token
    return changed


def divergence(before: Tensor, after: Tensor) -> float:
    p, q = before.double().softmax(dim=-1), after.double().softmax(dim=-1)
    return float((p * (p / q).log()).sum())


# Replaced tokens.


@pytest.mark.parametrize(("layer", "query"), [(None, -1), (None, 9), (0, 9), (1, -3)])
def test_each_replacement_is_a_run_of_its_own(pair, layer, query):
    model, plain = pair
    chosen = [8, 0, 2, 3]
    found = measured(model, "replacement", query=query, layer=layer, replacements=[*chosen, 2])
    assert found.replacement_kl is not None and found.replacement_change is not None
    assert found.replacement_token is not None
    assert found.target == ("final norm" if layer is None else f"layer {layer}")
    for b, row in enumerate(ROWS):
        at = query % len(row) if query < 0 else query
        streams, final, logits = plain_run(plain, row)
        kls = []
        for position in chosen:
            token = int(found.replacement_token[b, position])
            assert token != row[position] and token in row
            others, other_final, other_logits = plain_run(plain, swapped(row, position, token))
            here, there = (
                (final, other_final) if layer is None else (x[layer + 1] for x in (streams, others))
            )
            moved = (there[at] - here[at]).norm() / here[at].norm()
            kls.append(divergence(logits[at], other_logits[at]))
            assert float(found.replacement_kl[b, position]) == pytest.approx(kls[-1], rel=1e-3)
            change = float(found.replacement_change[b, position])
            assert change == pytest.approx(float(moved), rel=1e-4)
        assert max(kls) > 1e-3 and len(set(kls)) == len(kls)
        left = [i for i in range(max(LENGTHS)) if i not in chosen]
        assert found.replacement_kl[b, left].isnan().all()
        assert found.replacement_change[b, left].isnan().all()
        assert (found.replacement_token[b, left] == -1).all()


def test_positions_are_spread_over_the_text_up_to_the_chosen_one(sharp):
    model, plain = sharp
    row = torch.randint(3, 250, (100,))
    found = measured(model, "replacement", inputs=row[None], query=90)
    assert found.replacement_kl is not None and found.replacement_token is not None
    there = found.replacement_token[0] != -1
    assert torch.equal(there, ~found.replacement_kl[0].isnan())
    at = there.nonzero()[:, 0]
    assert len(at) == 64 and at[0] == 0 and at[-1] == 90
    assert set(at.diff().tolist()) == {1, 2}
    tokens = found.replacement_token[0, at]
    assert (tokens != row[at]).all() and torch.isin(tokens, row).all()
    _, _, logits = plain_run(plain, row)
    for position in (0, int(at[40]), 90):
        changed = swapped(row, position, int(found.replacement_token[0, position]))
        kl = divergence(logits[90], plain_run(plain, changed)[2][90])
        assert float(found.replacement_kl[0, position]) == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize(("row", "other"), [([5], 4), ([0], 1), ([7] * 6, 6), ([0] * 6, 1)])
def test_texts_without_another_token_get_the_neighbouring_one(sharp, row, other):
    model, plain = sharp
    ids = torch.tensor(row)
    found = measured(model, "replacement", "spread", inputs=ids[None])
    assert found.replacement_token is not None and found.replacement_kl is not None
    assert found.replacement_token.tolist() == [[other] * len(row)]
    _, _, logits = plain_run(plain, ids)
    for position in range(len(row)):
        _, _, moved = plain_run(plain, swapped(ids, position, other))
        kl = divergence(logits[-1], moved[-1])
        assert float(found.replacement_kl[0, position]) == pytest.approx(kl, rel=1e-3)
    assert found.spread_change is not None and found.spread is not None
    assert found.spread_change.tolist() == [[(len(row) - 1) // 2, other]]
    assert float(found.spread[0, 0].nan_to_num().max()) > 0


def test_a_seed_is_a_choice_of_tokens(sharp):
    model, _ = sharp
    one, same, other = (measured(model, "replacement", "spread", seed=s) for s in (3, 3, 4))
    for name in ("replacement_kl", "replacement_change", "spread"):
        first, again, changed = (getattr(found, name) for found in (one, same, other))
        torch.testing.assert_close(first, again, atol=0, rtol=0, equal_nan=True)
        assert float((first - changed).abs().nan_to_num().max()) > 0
    assert one.replacement_token is not None and other.replacement_token is not None
    assert one.spread_change is not None and other.spread_change is not None
    assert float((one.replacement_token != other.replacement_token).float().mean()) > 0.5
    assert not torch.equal(one.spread_change, other.spread_change)
    assert one.provenance.seed == 3


def test_parts_of_a_batch_are_the_whole(sharp):
    model, _ = sharp
    whole, parts = (measured(model, "replacement", "spread", batch_size=n) for n in (None, 1))
    for name in ("replacement_kl", "replacement_change", "spread", "spread_evicted"):
        ours, theirs = getattr(whole, name), getattr(parts, name)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert parts.provenance.forward_passes > whole.provenance.forward_passes


def test_a_soft_cap_on_the_logits_is_part_of_the_distribution():
    model, plain = beside_plain("gemma2")
    row, cap = ROWS[0], 0.5
    model.original_model.config.final_logit_softcapping = cap
    found = measured(model, "replacement", inputs=row[None], replacements=[4])
    assert found.replacement_token is not None and found.replacement_kl is not None
    changed = swapped(row, 4, int(found.replacement_token[0, 4]))
    kl = {}
    for capped in (cap, None):
        plain.config.final_logit_softcapping = capped
        logits = [plain_run(plain, r)[2][-1] for r in (row, changed)]
        assert capped is None or float(logits[0].abs().max()) < cap
        kl[capped] = divergence(logits[0], logits[1])
    assert float(found.replacement_kl[0, 4]) == pytest.approx(kl[cap], rel=1e-3)
    assert abs(kl[None] / kl[cap] - 1) > 0.5


# The spread of a change.


@pytest.mark.parametrize("changed", [None, 3])
def test_a_change_spreads_as_transformers_says(pair, changed):
    model, plain = pair
    found = measured(model, "spread", changed=changed, evict=2)
    assert found.spread is not None and found.spread_evicted is not None
    assert found.spread_change is not None and found.evicted == (2, 4)
    for b, row in enumerate(ROWS):
        at, token = found.spread_change[b].tolist()
        assert at == ((len(row) - 1) // 2 if changed is None else changed)
        assert token != row[at] and token in row
        after = swapped(row, at, token)
        hidden = additive_mask(plain, torch.where(torch.arange(len(row)) >= 4, 2, 0))
        moved = {}
        for name, mask in (("spread", None), ("spread_evicted", hidden)):
            before, behind = (torch.stack(plain_run(plain, r, mask)[0]) for r in (row, after))
            truth = (behind - before).norm(dim=-1) / before.norm(dim=-1)
            ours = getattr(found, name)[b]
            torch.testing.assert_close(ours[:, : len(row)], truth, atol=1e-5, rtol=1e-4)
            assert ours[:, len(row) :].isnan().all()
            # Causality, to the last bit; and nothing has moved yet where the change goes in.
            assert float(ours[:, :at].abs().max()) == 0
            assert ours[0, : len(row)].nonzero()[:, 0].tolist() == [at]
            assert float(ours[-1, at : len(row)].min()) > 0
            moved[name] = ours[:, : len(row)]
        assert float((moved["spread"] - moved["spread_evicted"]).abs().max()) > 1e-3


def test_no_change_is_felt_before_it_at_any_length(default_model, sharp):
    model = sharp[0]
    for length in (2, 7, 33, 50, 130, 67):
        model = default_model if length == 67 else model
        ids = torch.randint(3, 250, (1, length))
        found = measured(model, "spread", inputs=ids, changed=length - 1)
        assert found.spread is not None and found.spread_evicted is not None
        for moved in (found.spread, found.spread_evicted):
            assert float(moved[..., :-1].abs().max()) == 0 < float(moved[..., -1].min())


# Sinks.


def naive_sinks(model: Any, plain: Any, row: Tensor, tiled: bool = False) -> dict[str, Tensor]:
    """Every number of the profile, query by query and key by key."""
    q, k, v = (
        eyechart.capture(model, row[None], [Record(site)])[0]
        for site in (
            ("rotated_q", "rotated_k", "v") if has_site(model, "rotated_k") else ("q", "k", "v")
        )
    )
    with torch.no_grad():
        patterns = plain(row[None], output_attentions=True).attentions
    streams, _, _ = plain_run(plain, row)
    blocks = plain.base_model.h if hasattr(plain.base_model, "h") else plain.base_model.layers
    window = getattr(plain.config, "sliding_window", None) or len(row)
    kinds = getattr(plain.config, "layer_types", None) or ["sliding_attention"] * len(blocks)
    n, heads = len(row), patterns[0].shape[1]
    names = ("mass", "value_norm", "output_norm", "key_norm", "cosine", "cosine_others")
    found = {name: torch.zeros(len(blocks), heads) for name in names}

    def ratio(sizes: list[Tensor]) -> float:
        return float(sizes[0] / torch.stack(sizes[1:]).median())

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / a.norm() / b.norm())

    for layer, block in enumerate(blocks):
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        # GPT-2 keeps its matrices the other way round.
        out = attention.c_proj.weight.T if hasattr(block, "attn") else attention.o_proj.weight
        out = out.detach()
        seen_back = len(row) if kinds[layer] == "full_attention" else window
        for h in range(heads):
            groups = v[layer].shape[2]
            g = h % groups if tiled else h // (heads // groups)
            width = v[layer].shape[3]
            mine = out[:, h * width : (h + 1) * width]
            values = [v[layer][0, j, g] for j in range(n)]
            keys = [k[layer][0, j, g] for j in range(n)]
            queries = [q[layer][0, i, h] for i in range(n)]
            found["mass"][layer, h] = sum(float(patterns[layer][0, h, i, 0]) for i in range(n)) / n
            found["value_norm"][layer, h] = ratio([x.norm() for x in values])
            found["output_norm"][layer, h] = ratio([(mine @ x).norm() for x in values])
            found["key_norm"][layer, h] = ratio([x.norm() for x in keys])
            to_first = [cosine(queries[i], keys[0]) for i in range(1, n)]
            to_others = []
            for i in range(1, n):
                first = max(1, i - seen_back + 1)
                seen = [cosine(queries[i], keys[j]) for j in range(first, i + 1)]
                to_others.append(sum(seen) / len(seen))
            found["cosine"][layer, h] = sum(to_first) / (n - 1)
            found["cosine_others"][layer, h] = sum(to_others) / (n - 1)
    found["residual"] = torch.tensor([ratio([x.norm() for x in stream]) for stream in streams])
    return found


def test_sinks_are_what_loops_over_positions_find(pair):
    model, plain = pair
    found = measured(model, "sinks").sinks
    assert found is not None and found.output_norm is not None and found.prepend_bos is None
    truths = [naive_sinks(model, plain, row) for row in ROWS]
    for b, truth in enumerate(truths):
        torch.testing.assert_close(found.mass[b], truth["mass"].mean(dim=1), atol=1e-5, rtol=1e-4)
        for name in truth.keys() - {"mass"}:
            ours = getattr(found, name)[b]
            torch.testing.assert_close(ours, truth[name], atol=1e-5, rtol=1e-4)
    rate = torch.stack([truth["mass"] for truth in truths]).gt(0.3).float().mean(dim=(0, 2))
    torch.testing.assert_close(found.rate, rate)
    values = torch.stack([truth["value_norm"] for truth in truths]).flatten()
    low, high = values.sort().values[[len(values) // 2 - 1, len(values) // 2]].tolist()
    assert low - 1e-5 <= found.value_drain <= high + 1e-5


def test_heads_read_their_own_group_of_keys(sharp):
    model, plain = sharp
    found = measured(model, "sinks", inputs=ROWS[0][None]).sinks
    assert found is not None
    wrong = naive_sinks(model, plain, ROWS[0], tiled=True)
    for name in ("value_norm", "output_norm", "key_norm", "cosine", "cosine_others"):
        assert float((getattr(found, name)[0] - wrong[name]).abs().max()) > 1e-2


def test_the_sink_of_the_handmade_model(handmade):
    n = 12
    found = measured(handmade, "sinks", inputs=torch.arange(4, 4 + n)[None]).sinks
    assert found is not None
    harmonic = sum(1 / i for i in range(1, n + 1))
    mass = [(1 / n + 2 / n) / 2, (1 + harmonic / n) / 2]
    assert found.mass[0].tolist() == pytest.approx(mass, abs=1e-5)
    assert found.rate.tolist() == [0, 0.5]  # of layer 1, the sink; the uniform head is below
    # Every query of the sink asks for what the first key has and the others have the opposite of.
    assert float(found.cosine[0, 1, 0]) == pytest.approx(1)
    assert float(found.cosine_others[0, 1, 0]) == pytest.approx(-1)
    assert found.residual.tolist() == [[pytest.approx(1)] * 3]
    assert found.value_norm.isnan().all()  # there are no values to compare


def test_profiles_of_a_padded_batch_are_those_of_its_texts(sharp):
    model, _ = sharp
    texts = ["A longer line of text.", "Short enough."]
    together = measured(model, "sinks", inputs=texts)
    for b, text in enumerate(texts):
        alone = measured(model, "sinks", inputs=text)
        for which in ("sinks", "sinks_other_bos"):
            ours, theirs = getattr(together, which), getattr(alone, which)
            for name in ("mass", "value_norm", "output_norm", "cosine", "cosine_others"):
                torch.testing.assert_close(getattr(ours, name)[b], getattr(theirs, name)[0])
            torch.testing.assert_close(ours.residual[b], theirs.residual[0])


def test_the_other_profile_is_that_of_the_text_with_bos_toggled(sharp):
    model, plain = sharp
    text = "A line of text!!"
    both = {bos: measured(model, "sinks", inputs=text, prepend_bos=bos) for bos in (True, False)}
    bare = both[False].sequences.tokens[0]
    rows = {True: torch.cat([torch.tensor([model.tokenizer.bos_token_id]), bare]), False: bare}
    for bos, found in both.items():
        assert found.sinks is not None and found.sinks_other_bos is not None
        assert (found.sinks.prepend_bos, found.sinks_other_bos.prepend_bos) == (bos, not bos)
        for profile, row in ((found.sinks, rows[bos]), (found.sinks_other_bos, rows[not bos])):
            mass = naive_sinks(model, plain, row)["mass"].mean(dim=1)
            torch.testing.assert_close(profile.mass[0], mass)
    given = measured(model, "sinks", inputs=rows[True][None])
    assert given.sinks is not None and given.sinks_other_bos is None
    alone = measured(model, "sinks", inputs=torch.tensor([[9]])).sinks
    assert alone is not None and alone.value_norm.isnan().all() and float(alone.mass.min()) == 1


# Where derivatives cannot be had.


def no_gradient(module: Any) -> None:
    """What a module with quantised weights is to autograd."""
    plain = module.forward

    def forward(*args: Any, **options: Any) -> Any:
        with torch.no_grad():
            return plain(*args, **options)

    module.forward = forward


def rest_is_there(found: InformationFlow, missing: set[str]) -> None:
    """Everything but what is missing was delivered, and the missing has a reason."""
    assert set(found.unavailable) == missing
    fields = {
        "replacement": ("replacement_kl", "replacement_change"),
        "topology": ("eigenvalues", "hitting_depth"),
        "spread": ("spread", "spread_evicted"),
    }
    for measure in MEASURES:
        for name in fields.get(measure, (measure,)):
            assert (getattr(found, name) is None) == (measure in missing), name


def test_training_mode_costs_the_derivatives_only():
    model = eyechart.load("tiny-random-gpt2", device="cpu")
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    calm = information_flow(model, ROWS[0][None])
    rest_is_there(calm, set())
    model.train()
    for part in model.blocks[0].modules():
        part.training = False  # modes that differ are given back as they were
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    found = information_flow(model, ROWS[0][None])
    rest_is_there(found, {"sensitivity"})
    assert "call model.eval()" in found.unavailable["sensitivity"]
    assert modes == {name: module.training for name, module in model.named_modules()}
    for name in ("rollout", "alti", "path_bound", "replacement_kl", "spread", "spread_evicted"):
        torch.testing.assert_close(getattr(found, name), getattr(calm, name), equal_nan=True)
    assert found.sinks is not None and calm.sinks is not None
    torch.testing.assert_close(found.sinks.value_norm, calm.sinks.value_norm)
    assert any("training mode" in note for note in found.provenance.notes)
    assert not any("training mode" in note for note in calm.provenance.notes)

    def stop(step: str) -> None:
        if step == "rollout":
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        information_flow(model, ROWS[0][None], on_step=stop)
    assert modes == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("self_attn.o_proj", {"sensitivity"}),
        # Beside these a derivative has another way back, and would only look right.
        ("self_attn.q_proj", {"sensitivity"}),
        ("self_attn.v_proj", {"sensitivity"}),
        ("mlp", {"sensitivity", "path_bound"}),
        ("mlp.down_proj", {"sensitivity", "path_bound"}),
    ],
)
def test_a_part_without_gradients_costs_the_derivatives_only(part, missing):
    model = eyechart.load("tiny-random-llama", device="cpu")
    module: Any = model.original_model
    for step in ("model", "layers", "1", *part.split(".")):
        module = getattr(module, step)
        module = getattr(module, "original_component", module)
    no_gradient(module)
    found = information_flow(model, ROWS[0][None])
    rest_is_there(found, missing)
    assert found.unavailable["sensitivity"].startswith(
        f"model.layers.1.{part} of tiny-random-llama passes no gradient on"
    )


@pytest.mark.filterwarnings("ignore")  # torch's own, about its quantisation
def test_a_quantised_model_is_measured_without_derivatives():
    """Autograd goes through dynamically quantised weights without a word, and finds zeros."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = CATALOGUE["tiny-random-llama"].folder()
    plain, apart = (
        AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        for _ in range(2)
    )
    chosen = {
        name: default_dynamic_qconfig
        for name, m in plain.named_modules()
        if isinstance(m, nn.Linear)
    }
    del chosen["lm_head"]  # the bridge asks for its weight
    plain, apart = (quantize_dynamic(m, chosen) for m in (plain, apart))
    model = TransformerBridge.boot_transformers(
        "quantised", hf_model=plain, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
    )
    measures = ("rollout", "topology", "sensitivity", "replacement", "spread", "sinks")
    # One text a pass, because the format of activations is chosen anew for each whole tensor.
    found = information_flow(model, ROWS[0][None], measures=measures, batch_size=1)
    assert set(found.unavailable) == {"sensitivity"}
    assert found.unavailable["sensitivity"].startswith("model.layers.0.self_attn.q_proj of")
    assert "load the model in a floating-point format" in found.unavailable["sensitivity"]
    with torch.no_grad():
        patterns = apart(ROWS[0][None], output_attentions=True).attentions
    product = torch.eye(LENGTHS[0])
    for pattern in patterns:
        product = (pattern[0].mean(dim=0) + torch.eye(LENGTHS[0])) / 2 @ product
    assert found.rollout is not None and found.replacement_token is not None
    torch.testing.assert_close(found.rollout[0, -1], product[-1])
    assert found.replacement_kl is not None
    changed = swapped(ROWS[0], 5, int(found.replacement_token[0, 5]))
    kl = divergence(*(plain_run(apart, row)[2][-1] for row in (ROWS[0], changed)))
    assert float(found.replacement_kl[0, 5]) == pytest.approx(kl, rel=1e-3)


# Bad input, before anything is paid for.


def runs_of(model: Any) -> list[int]:
    """Grows by one with every run of a model."""
    runs: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *ignored: runs.append(1))
    return runs


@pytest.fixture(scope="module")
def counted() -> Any:
    """A model that no one has looked at yet, and how often it was run."""
    model = eyechart.load("tiny-random-gpt2", device="cpu")
    return model, runs_of(model.original_model)


IDS = torch.stack([ROWS[0][:14], ROWS[1]])


@pytest.mark.parametrize(
    ("inputs", "options", "error", "said"),
    [
        (IDS, {"measures": ("rollout", "vibes")}, Usage, r"unknown measures 'vibes'; choose from"),
        (IDS, {"measures": ()}, Usage, r"no measures; choose from rollout"),
        (IDS, {"query": 14}, Usage, r"query=14, but a sequence has 14 tokens"),
        (IDS, {"query": -15}, Usage, r"query=-15, but a sequence has 14 tokens"),
        (["A longer line.", "Short"], {"query": 9}, Usage, r"query=9, but a sequence has 6"),
        (IDS, {"layer": 2}, Usage, r"layer=2, but .* has layers 0 to 1"),
        (IDS, {"layer": -1}, Usage, r"layer=-1, but .* has layers 0 to 1"),
        (IDS, {"replacements": [0, 14]}, Usage, r"replacements=14, but positions go from 0 to 13"),
        (IDS, {"replacements": [7], "query": 6}, Usage, r"replacements=7, .* from 0 to 6"),
        (IDS, {"replacements": [-1]}, Usage, r"replacements=-1, but positions"),
        (IDS, {"changed": 14}, Usage, r"changed=14, but positions go from 0 to 13"),
        (IDS, {"changed": -1}, Usage, r"changed=-1, but positions"),
        (IDS, {"evict": 0}, Usage, r"evict must be at least 1, got 0"),
        (IDS, {"probes": 0}, Usage, r"probes must be at least 1, or None"),
        (IDS, {"batch_size": 0}, Usage, r"batch_size must be at least 1, got 0"),
        (IDS, {"prepend_bos": True}, Usage, r"prepend_bos applies to text"),
        ("  \n", {}, InputError, r"prompt is empty"),
        (["Fine.", ""], {}, InputError, r"prompt 1 is empty"),
        (torch.zeros(1, 0, dtype=torch.long), {}, InputError, r"token tensor is empty"),
        (torch.full((1, 513), 5), {}, InputError, r"513 tokens, but .* sees at most 512"),
        (torch.tensor([[3, 259]]), {}, InputError, r"token id 259 is outside the vocabulary"),
        (torch.tensor([[-1, 3]]), {}, InputError, r"token id -1 is outside the vocabulary"),
        (torch.ones(1, 4), {}, InputError, r"token ids must be an integer tensor"),
    ],
)
def test_bad_input_is_refused_before_a_pass_is_paid_for(counted, inputs, options, error, said):
    model, runs = counted
    with pytest.raises(error, match=said):
        information_flow(model, inputs, **options)
    assert not runs


def test_damaged_weights_and_other_models_are_refused_before_a_pass_is_paid_for():
    model = eyechart.load("tiny-random-gpt2", device="cpu")
    whole: Any = model.original_model
    plain: Any = AutoModelForCausalLM.from_pretrained(CATALOGUE["tiny-random-gpt2"].folder())
    runs, others = runs_of(whole), runs_of(plain)
    with torch.no_grad():
        next(whole.transformer.h[1].mlp.parameters()).view(-1)[7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.1\.mlp.* holds 1 NaN or infinite"):
        information_flow(model, IDS)
    with pytest.raises(UnsupportedModelError, match="expected a TransformerBridge, got GPT2LMHead"):
        information_flow(plain, IDS)
    assert not runs and not others


def test_what_counts_the_passes_does_count_them(counted):
    model, runs = counted
    before = len(runs)
    found = information_flow(model, IDS, measures=("rollout",))
    assert found.provenance.forward_passes == 1
    rehearsed = len(runs) - before
    information_flow(model, IDS, measures=("rollout",))
    assert len(runs) - before - rehearsed == 1 < rehearsed


# What is kept.


def spearman(a: Tensor, b: Tensor) -> float:
    """Without ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_everything_is_saved_and_comes_back_equal(sharp, tmp_path):
    model, _ = sharp
    texts = ["A longer line of text.", "A short line."]
    found = information_flow(model, texts, query=-2, replacements=list(range(12)))
    rest_is_there(found, set())
    again = eyechart.open_result(found.save(tmp_path / "flow"))
    assert isinstance(again, InformationFlow) and again == found and repr(again) == repr(found)
    assert again.to_frame().equals(found.to_frame())
    assert again.agreement().equals(found.agreement())
    assert again.sinks_other_bos is not None and again.sinks_other_bos.prepend_bos is False
    assert again != information_flow(model, texts, query=-2, seed=1)

    frame, lasts = again.to_frame(), found.query.tolist()
    assert len(frame) == sum(last + 1 for last in lasts)
    assert set(frame.columns) == {
        "batch", "position", "token", *CHEAP, *TRUTHS, "sensitivity_interval"
    }  # fmt: skip
    row = frame[(frame["batch"] == 1) & (frame["position"] == 3)].iloc[0]
    assert found.rollout is not None and found.attention is not None
    assert row["token"] == found.sequences.labels[1][3]
    assert row["rollout"] == pytest.approx(float(found.rollout[1, -1, 3]))
    assert row["attention"] == pytest.approx(float(found.attention[1, :, 3].mean()))

    table = again.agreement()
    assert len(table) == len(CHEAP) * len(TRUTHS) and set(table["sequences"]) == {2}
    for line in table.to_dict("records"):
        expected = []
        for b, last in enumerate(lasts):
            pair = [found.by_position(n)[b, : last + 1] for n in (line["measure"], line["truth"])]
            there = ~(pair[0].isnan() | pair[1].isnan())
            expected.append(spearman(pair[0][there], pair[1][there]))
        assert line["spearman"] == pytest.approx(sum(expected) / 2)
        assert (line["lowest"], line["highest"]) == pytest.approx((min(expected), max(expected)))
    said = repr(found)
    assert said.startswith("InformationFlow of ") and "2 sequences of 14-23 tokens" in said
    assert found.sinks is not None
    assert f"{found.sinks.value_drain:.2f} of the others' length" in said
    assert f"{float(found.rollout[0, -1, 0]):.3f} of the chosen row sits on the first" in said


@pytest.mark.parametrize("measures", [("sinks",), ("spread",), ("rollout", "path_bound"), None])
def test_a_result_with_parts_missing_is_kept_as_well(measures, tmp_path):
    model = eyechart.load("tiny-random-lfm2", device="cpu")
    model.train()
    found = information_flow(model, IDS, measures=measures or MEASURES, replacements=[0, 1])
    hybrid = {"rollout", "topology", "path_bound", "norm_rollout", "alti"}
    expected = (hybrid | {"sensitivity"}) & set(measures or MEASURES)
    assert set(found.unavailable) == expected
    again = InformationFlow.open(found.save(tmp_path / "flow"))
    assert again == found and repr(again) == repr(found)
    assert again.to_frame().equals(found.to_frame()) and again.agreement().empty
    for name in expected:
        assert f"{name} not available: {found.unavailable[name]}" in repr(again)
    with pytest.raises(Usage, match=r"no rollout: (blocks 0 have no attention|it was not asked)"):
        again.by_layer("rollout")
    if again.sinks is not None:
        assert again.sinks.mass[:, 0].isnan().all() and again.sinks.rate.isnan().tolist() == [
            True,
            False,
        ]
        assert math.isfinite(again.sinks.value_drain)


def test_nothing_at_all_is_an_error_with_the_reason():
    model = eyechart.load("tiny-random-llama", device="cpu")
    model.train()
    with pytest.raises(EyechartError, match=r"call model\.eval\(\) first"):
        information_flow(model, IDS, measures=("sensitivity",))
