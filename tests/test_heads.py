"""The census: names, trials, verdicts and sets, against answers that are known."""

import math

import pytest
import torch
from families import FAMILIES, ROUNDED, UNFUSED, built
from hypothesis import given, settings
from hypothesis import strategies as st
from idle_heads import KINDS, VERDICTS, VOCABULARY, write_idle_heads
from jaxtyping import Float
from torch import Tensor
from transformer_lens.head_detector import HeadName, detect_head

import eyechart
from eyechart.errors import InputError, NonFiniteError, UsageError
from eyechart.heads.divergence import Reference
from eyechart.heads.inputs import TWICE, by_domain, measured_positions, prepared, with_repeats
from eyechart.heads.names import count, repeats
from eyechart.heads.onward import Onward
from eyechart.heads.rotary import Rotation, rotation
from eyechart.heads.together import Sets
from eyechart.results import HeadCensus, open_result
from eyechart.results.head_trials import cheap_enough
from eyechart.sequences import from_ids
from eyechart.targets import AfterEarlierCopies, First, Window
from eyechart.texts import DOMAINS, HELD_OUT, TEXTS

pytestmark = pytest.mark.filterwarnings("ignore::eyechart.errors.FallbackWarning")


def said_twice(rows, half=14):
    """Rows of different tokens, each said twice, behind the token that stands in front."""
    once = [torch.randperm(VOCABULARY - 1)[:half] + 1 for _ in range(rows)]
    return torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), o, o]) for o in once])


@pytest.fixture(scope="module", params=[True, False], ids=["grouped", "each its own"])
def idle(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("idle")
    write_idle_heads(folder, request.param)
    return eyechart.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def idle_census(idle):
    torch.manual_seed(1)
    return eyechart.head_census(idle, said_twice(8), held_out=said_twice(10))


def test_every_head_of_the_known_model_gets_its_name_and_verdict(idle_census):
    assert idle_census.names.kinds() == KINDS
    assert idle_census.trials.verdicts(idle_census.budget) == VERDICTS
    assert idle_census.no_ops() == (
        (0, 0, "identity"),
        (0, 1, "zero"),
        (0, 3, "zero"),
        (1, 0, "zero"),
        (1, 1, "first"),
        (1, 3, "zero"),
    )
    # A diagonal head with a useful map is far from idle, and so is a sink with a value.
    trials = idle_census.trials
    assert trials.cost("zero")[0, 0] > 0.5 > 1e-6 > trials.cost("identity")[0, 0]
    assert trials.cost("zero")[1, 1] > 0.02 > 1e-6 > trials.cost("first")[1, 1]


def test_all_idle_heads_of_the_known_model_go_together(idle_census):
    together = idle_census.together
    assert {head[:2] for head in together.heads} == {h[:2] for h in idle_census.no_ops()}
    assert float(together.kl.mean()) < 1e-4
    # Two heads of eight are needed, so random orders soon meet one of them.
    assert all(size <= 6 for size in together.random_sizes) and together.factor > 1
    assert together.unseen is None and together.unseen_kl is None


def test_definition_5_1_holds_for_the_diagonal_heads_only(idle_census):
    assert idle_census.names.diagonal_heads(0.05) == [(0, 0), (0, 1)]
    assert idle_census.names.diagonal_heads(1e-9) == []
    assert float(idle_census.names.smallest_previous[0, 2]) > 0.95
    with pytest.raises(UsageError, match="between 0 and 1"):
        idle_census.names.diagonal_heads(1.0)


def test_the_frame_has_one_row_a_head(idle_census, tmp_path):
    frame = idle_census.to_frame().set_index(["layer", "head"])
    assert list(frame["kind"]) == [kind for row in KINDS for kind in row]
    assert frame.loc[(0, 0), "replacement"] == "identity"
    for name in ("identity", "first", "zero", "mean"):
        there = frame[f"kl_{name}"].notna()
        assert (frame[f"kl_{name}_low"][there] <= frame[f"kl_{name}"][there] + 1e-7).all()
        assert (frame[f"kl_{name}_high"][there] >= frame[f"kl_{name}"][there] - 1e-7).all()
    assert frame["kl_zero"].notna().all() and (frame["cost_flops"] > 0).all()
    idle_census.save(tmp_path)
    assert open_result(tmp_path) == idle_census
    assert "6 of 8 heads are no-ops" in repr(idle_census)


def ablated(model, ids, edits):
    """Logits with hooks at work, from the embedding up: the plain way."""
    with torch.no_grad():
        return model.run_with_hooks(ids, fwd_hooks=edits, return_type="logits").double()


def kl(reference, logits):
    p, q = reference.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def at_hook(layer, name, change):
    return (f"blocks.{layer}.attn.{name}", lambda x, hook: change(x.clone()))


@pytest.mark.parametrize("family", FAMILIES)
def test_trials_are_what_hooks_do_from_the_embedding_up(family):
    with built(family, gain=2) as folder:
        model = eyechart.load(str(folder), device="cpu")
    ids = torch.randint(3, 250, (4, 12))
    census = eyechart.head_census(model, ids, screen=False, context=8)
    trials, positions = census.trials, list(census.trials.positions)
    plain = ablated(model, ids, [])
    layer, head = int(trials.means[..., 0].isnan().logical_not().nonzero()[-1][0]), 1
    assert trials.floor < 1e-6
    assert trials.shared == (family != "openai-gpt")
    assert ("price" in census.unavailable) == (family in UNFUSED)

    def zero(z):
        z[:, :, head] = 0
        return z

    def nothing(pattern):
        pattern[:, head] = 0
        return pattern

    def identity(pattern):
        pattern[:, head] = torch.eye(pattern.shape[-1])
        return pattern

    def first(pattern):
        pattern[:, head] = 0
        pattern[:, head, :, 0] = 1
        return pattern

    by_pattern = {"zero": nothing, "identity": identity, "first": first}
    edits = {name: at_hook(layer, "hook_pattern", edit) for name, edit in by_pattern.items()}
    if family in ROUNDED:  # their pattern's hook fires after the fact
        edits = {"zero": at_hook(layer, "hook_z", zero)}
    if family == "jetmoe":  # and this one has no other that shows heads
        return
    for name, edit in edits.items():
        truth = kl(plain, ablated(model, ids, [edit]))[:, positions].mean(dim=-1)
        found = trials.kl[name][:, layer, head].view(4, -1).mean(dim=-1).double()
        assert float(truth.max()) > 1e-9
        torch.testing.assert_close(found, truth, atol=2e-6, rtol=2e-2)


def test_runs_that_start_at_a_layer_equal_those_from_the_embedding(llama):
    texts = from_ids(llama, torch.randint(3, 250, (3, 14)).tolist())
    onward = Onward(llama, texts, (3, 9, 12))

    def put(mixed: Tensor, values: Tensor | None) -> None:
        mixed[:, :, 1] = mixed[:, :, 0]

    last = onward.layers[-1]
    assert onward.shares
    begun = onward.logits(last, {last: put})
    onward.shares = False
    torch.testing.assert_close(begun, onward.logits(last, {last: put}), atol=1e-5, rtol=1e-5)
    assert float((begun - onward.reference).abs().max()) > 1e-4


def test_a_lens_is_seen_by_the_trials(llama):
    ids = torch.randint(3, 250, (4, 16))
    with torch.no_grad(), eyechart.lenses.evict(llama, keys=1, after=4):
        census = eyechart.head_census(llama, ids, screen=False)
        plain = llama(ids).double()

        def zero(z):
            z[:, :, 0] = 0
            return z

        other = ablated(llama, ids, [at_hook(0, "hook_z", zero)])
    truth = kl(plain, other)[:, list(census.trials.positions)].mean()
    assert float(census.trials.cost("zero")[0, 0]) == pytest.approx(float(truth), rel=1e-2)
    assert "patterns" in census.unavailable


def test_divergence_is_exact_where_logarithms_are_not():
    logits = 8 * torch.randn(2, 3, 500)
    following = torch.randint(500, (2, 3))
    for size in (1e-4, 1e-1, 3.0):
        other = logits + size * torch.randn(2, 2, 3, 500) + 7  # a constant changes nothing
        divergence, loss = Reference(logits, following).moved(other.flatten(0, 1))
        p, q = logits.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
        truth = (p.exp() * (p - q)).sum(dim=-1)
        torch.testing.assert_close(divergence.double(), truth, rtol=2e-2, atol=1e-12)
        taken = following[None, ..., None].expand(2, -1, -1, -1)
        change = p.expand_as(q).gather(-1, taken) - q.gather(-1, taken)
        torch.testing.assert_close(loss.double(), change[..., 0], rtol=1e-3, atol=1e-5)
    same, unmoved = Reference(logits, following).moved(logits)
    assert not same.any() and not unmoved.any()


def test_scores_are_those_of_detect_head(default_model):
    text = TEXTS["dialogue"]
    names = eyechart.head_census(default_model, text, layers=(), positions=1, context=8).names
    kinds: dict[HeadName, Tensor] = {
        "previous_token_head": names.score("previous"),
        "duplicate_token_head": names.in_text["duplicate"].mean(dim=0),
        "induction_head": names.in_text["induction"].mean(dim=0),
    }
    for kind, found in kinds.items():
        truth = detect_head(default_model, text, kind)
        torch.testing.assert_close(found, truth, atol=1e-6, rtol=0)
        assert float(truth.max()) > 0.01


def test_chance_is_what_shuffled_keys_score():
    torch.manual_seed(3)
    tokens = torch.randint(6, (4, 20))
    patterns = (4 * torch.randn(4, 1, 20, 20)).masked_fill(
        torch.ones(20, 20).triu(1).bool(), -math.inf
    )
    rows = patterns.softmax(dim=-1)
    for target in (First(1), Window(5), AfterEarlierCopies()):
        keys = count(target, tokens)
        visible = torch.arange(1, 21)
        chosen = target.keys(tokens, 0, 20).expand(4, 20, 20)
        draws = []
        for _ in range(300):
            shuffled = torch.stack(
                [
                    torch.stack(
                        [
                            torch.cat([row[: i + 1][torch.randperm(i + 1)], row[i + 1 :]])
                            for i, row in enumerate(text[0])
                        ]
                    )
                    for text in rows
                ]
            )
            draws.append(float((shuffled * chosen).sum(dim=-1).mean()))
        draws = torch.tensor(draws)
        assert float(draws.mean()) == pytest.approx(float((keys / visible).mean()), abs=0.01)


def test_the_null_of_a_census_is_an_upper_bound(handmade):
    census = eyechart.head_census(handmade, torch.randint(3, 250, (6, 16)), layers=(), context=8)
    names = census.names
    assert names.kinds() == [["diagonal", "previous-token"], ["sink", "uniform"]]
    # A uniform head is what chance makes: no evidence, and below the line.
    assert float(names.evidence("sink")[1, 1]) == pytest.approx(0, abs=1e-5)
    assert float(names.score("sink")[1, 1]) < float(names.shuffled["sink"][1, 1])
    assert names.chance["sink"] == pytest.approx(sum(1 / i for i in range(1, 17)) / 16, abs=1e-6)
    assert names.ceiling["previous"] == pytest.approx(15 / 16)


def test_random_tokens_are_said_twice_with_one_earlier_copy(llama):
    texts = prepared(llama, ["Some words to begin with, and then some."], True, "x")[0]
    rows = repeats(llama, texts, seed=4)
    length = rows.tokens.shape[1]
    half = (length - 1) // 2
    assert (rows.tokens[:, 1 : half + 1] == rows.tokens[:, half + 1 :]).all()
    assert (rows.tokens[:, 0] == texts.tokens[0, 0]).all()
    assert all(len(set(row[1 : half + 1])) == half for row in rows.tokens.tolist())
    copies = count(AfterEarlierCopies(), rows.tokens)
    assert (copies[:, half + 1 : -1] >= 1).all() and not copies[:, 1:half].any()


def test_held_out_texts_include_some_said_twice(default_model):
    texts, domains = prepared(default_model, by_domain(HELD_OUT), None, "x")
    texts = texts.first_tokens(48)
    both, named = with_repeats(default_model, texts, domains)
    front = int(bool(texts.prepend_bos))
    assert both.tokens.shape == (len(HELD_OUT) + 2, 48) and named[-2:] == (TWICE, TWICE)
    half = (48 - front) // 2
    row = both.tokens[-2, front:]
    assert (row[:half] == row[half : 2 * half]).all()
    assert not set(TEXTS.values()) & set(HELD_OUT.values())


@given(length=st.integers(8, 200), wanted=st.integers(1, 40))
def test_measured_positions_have_something_before_and_after(length, wanted):
    found = measured_positions(length, wanted)
    assert list(found) == sorted(set(found)) and 1 <= len(found) <= wanted
    assert found[0] >= 0 and found[-1] <= length - 2


def turned(
    q: Float[Tensor, "head d_head"], first: list[int], second: list[int], angle: Tensor, count: int
) -> Tensor:
    """Queries of a constant stream at ``count`` positions, turned by hand."""
    out = q[:, None].repeat(1, count, 1).double()
    phase = torch.arange(count)[:, None] * angle
    a, b = out[..., first], out[..., second]
    out[..., first] = a * phase.cos() - b * phase.sin()
    out[..., second] = b * phase.cos() + a * phase.sin()
    return out


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from(["halves", "neighbours"]),
    width=st.sampled_from([16, 24]),
    part=st.sampled_from([1.0, 0.5]),
    behind=st.booleans(),
    base=st.sampled_from([1e2, 1e4, 5e5]),
)
def test_a_rotation_is_seen_whatever_its_layout(layout, width, part, behind, base):
    size = int(width * part)
    start = width - size if behind else 0
    at = list(range(start, start + size))
    first, second = (at[: size // 2], at[size // 2 :])
    if layout == "neighbours":
        first, second = at[0::2], at[1::2]
    angle = base ** (-torch.arange(size // 2).double() / (size // 2))
    found = rotation(turned(torch.randn(3, width), first, second, angle, 40).float())
    assert isinstance(found, Rotation)
    torch.testing.assert_close(found.angle[: size // 2], angle, atol=2e-5, rtol=1e-3)
    assert not found.angle[size // 2 :].abs().gt(1e-5).any()
    assert {frozenset(p) for p in zip(first, second, strict=True)} <= {
        frozenset(p) for p in zip(found.first, found.second, strict=True)
    }


def test_what_is_no_rotation_is_told():
    q = torch.randn(3, 1, 8)
    assert "not turned" in str(rotation(q.expand(-1, 20, -1)))
    assert "not by a rotation" in str(rotation(torch.randn(3, 20, 8)))


def test_rotary_use_of_a_model_is_its_own_frequencies(llama, gpt2):
    ids = torch.randint(3, 250, (4, 16))
    use = eyechart.head_census(llama, ids, layers=(), context=8).rotary
    assert use is not None
    module = llama.original_model.model.rotary_emb
    for layer in use.angle:
        torch.testing.assert_close(layer, module.inv_freq, atol=1e-5, rtol=1e-3)
    assert ((use.q_high >= 0) & (use.q_high <= 1)).all()
    census = eyechart.head_census(gpt2, ids, layers=(), context=8)
    assert census.rotary is None and "no rotary embedding" in census.unavailable["rotary"]


class Additive(Sets):
    """Sets whose heads cost a known sum."""

    def __init__(self, costs):
        self.costs, self.path, self.runs = costs, [], 0

    def run(self, chosen):
        self.runs += 1
        total = torch.tensor(sum(self.costs[head[0]] for head in chosen))
        return total[None, None], total[None, None]


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=40), budget=st.floats(1e-4, 3))
def test_sets_are_as_large_as_the_budget_allows(costs, budget):
    costs = sorted(costs)
    order = [(i, 0, "zero") for i in range(len(costs))]
    sums = torch.tensor(costs).cumsum(0)
    best = int((sums <= budget).sum())
    if bool(((sums - budget).abs() < 1e-4).any()):
        return  # float32 decides
    sets = Additive(costs)
    chosen = sets.largest(order, budget, lambda step: None)
    assert len(chosen) == best  # cheapest first: where costs add up, nothing is larger
    assert sets.fitting(order, budget) == best
    assert all(kept == (cost <= budget) for _, cost, kept in sets.path)


def test_a_head_must_be_cheap_on_every_domain():
    kl = torch.tensor([[0.001], [0.001], [0.001], [0.02]])[..., None]
    high = torch.full((1, 1), 0.008)
    assert cheap_enough(kl, high, ["a", "a", "b", "b"], 0.03)
    assert not cheap_enough(kl, high, ["a", "a", "b", "b"], 0.01)
    assert cheap_enough(kl, high, ["a"] * 4, 0.01)
    assert not cheap_enough(kl, 2 * high, ["a"] * 4, 0.01)
    assert not cheap_enough(kl * torch.nan, high * torch.nan, ["a"] * 4, 0.01)


def test_an_interrupted_census_goes_on_where_it_was(llama, tmp_path):
    ids, told = torch.randint(3, 250, (4, 16)), []

    def stop(step):
        told.append(step)
        if step == "trials: layer 2 of 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eyechart.head_census(llama, ids, resume=tmp_path, on_step=stop)
    (kept,) = tmp_path.glob("*.safetensors")
    whole = eyechart.head_census(llama, ids)
    resumed = eyechart.head_census(llama, ids, resume=tmp_path)
    assert resumed.to_frame().equals(whole.to_frame())
    assert resumed.trials.passes < whole.trials.passes  # the first layer was not tried again
    assert not list(tmp_path.iterdir())  # what is finished is not left lying about
    # Other texts, another budget or a damaged file: nothing is taken over.
    with pytest.raises(KeyboardInterrupt):
        eyechart.head_census(llama, ids, resume=tmp_path, on_step=stop)
    kept.write_bytes(b"damaged")
    again = eyechart.head_census(llama, ids, resume=tmp_path)
    assert again.to_frame().equals(whole.to_frame())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"budget": 0.0}, UsageError, "budget must be positive"),
        ({"joint_budget": math.inf}, UsageError, "joint_budget must be positive"),
        ({"share": 1.0}, UsageError, "between 0 and 1"),
        ({"tokens": 4}, UsageError, "tokens must be at least 8"),
        ({"layers": (0, 7)}, UsageError, r"layers \[7\] have no attention"),
        ({"context": 10**6}, UsageError, "context="),
        ({"inputs": "short"}, InputError, "give at least 8"),
        ({"inputs": ["long enough to be named by far", "no"]}, InputError, "text 1 has"),
        ({"inputs": {"prose": []}}, InputError, "none"),
        ({"resume": "/proc/nowhere"}, UsageError, "cannot write"),
    ],
)
def test_bad_input_is_told_before_anything_is_paid_for(llama, monkeypatch, arguments, error, said):
    def paid(*args, **kwargs):
        raise AssertionError("a forward pass was paid for")

    facts = eyechart.models.facts_of(llama)
    assert facts.n_layers
    monkeypatch.setattr(type(llama), "forward", paid)
    given = {"inputs": torch.randint(3, 250, (2, 16)), **arguments}
    with pytest.raises(error, match=said):
        eyechart.head_census(llama, given.pop("inputs"), **given)


def test_nan_made_by_a_trial_names_the_layer(tmp_path):
    write_idle_heads(tmp_path, True)
    model = eyechart.load(str(tmp_path), device="cpu")
    onward = Onward(model, from_ids(model, said_twice(2).tolist()), (3, 5))

    def spoil(mixed: Tensor, values: Tensor | None) -> None:
        mixed[:, :, 0] = math.inf

    with pytest.raises(NonFiniteError, match="layer 1"):
        onward.logits(1, {1: spoil})


def test_what_fails_late_does_not_cost_the_rest(llama, monkeypatch):
    def fail(*arguments):
        raise NonFiniteError("a set of heads gave NaN")

    monkeypatch.setattr("eyechart.heads.census.largest_set", fail)
    monkeypatch.setattr("eyechart.heads.census.rotary_use", fail)
    census = eyechart.head_census(llama, torch.randint(3, 250, (4, 16)))
    assert census.together is None and census.rotary is None
    assert census.unavailable == dict.fromkeys(("rotary", "together"), "a set of heads gave NaN")
    assert census.price is not None and census.price.set_flops == 0
    assert "together is missing: a set of heads gave NaN" in repr(census)


def test_trials_that_do_not_fit_the_memory_are_run_in_smaller_batches(llama, monkeypatch):
    ids, sizes = torch.randint(3, 250, (4, 16)), []
    whole = eyechart.head_census(llama, ids)
    run = Onward.logits

    def small(self, layer, exchanges, copies=1):
        if copies > 2:
            raise torch.OutOfMemoryError("too much")
        sizes.append(copies)
        return run(self, layer, exchanges, copies)

    monkeypatch.setattr(Onward, "logits", small)
    census = eyechart.head_census(llama, ids)
    assert max(sizes) == 2
    for name, found in census.trials.kl.items():
        torch.testing.assert_close(
            found, whole.trials.kl[name], atol=1e-7, rtol=1e-3, equal_nan=True
        )


def test_the_search_for_sets_can_be_left_out(llama):
    census = eyechart.head_census(llama, torch.randint(3, 250, (4, 16)), joint_budget=None)
    assert census.together is None and "together" not in census.unavailable
    assert census.price is not None and census.price.set_flops == 0
    assert "at once" not in repr(census)
    with (
        pytest.raises(UsageError, match="no set of heads"),
        eyechart.lenses.skip_heads(census, llama),
    ):
        pass


def test_nothing_is_resumed_under_a_lens(llama, tmp_path):
    ids = torch.randint(3, 250, (4, 16))
    with (
        eyechart.lenses.evict(llama, keys=1, after=2),
        pytest.raises(UsageError, match="under a lens"),
    ):
        eyechart.head_census(llama, ids, resume=tmp_path)


def test_few_texts_are_cut_into_blocks_for_the_bootstrap(llama):
    ids = torch.randint(3, 250, (1, 40))
    census = eyechart.head_census(llama, ids, screen=False)
    trials = census.trials
    assert len(trials.units) == 8 and set(trials.units.tolist()) == {0}
    assert bool((trials.high["zero"] > trials.low["zero"]).all())
    assert any("held_out" in note for note in census.provenance.notes)


def test_domains_are_those_of_the_texts(llama):
    prose = ["A sentence of some length, to be read.", "Another sentence, also of some length."]
    census = eyechart.head_census(
        llama,
        {"prose": prose, "code": ["for i in range(10): print(i, i + 1)"]},
        tokens=16,
        positions=4,
    )
    assert census.names.domains == ("prose", "prose", "code")
    domains = census.domains()
    assert set(domains["domain"]) == {"prose", "code"}
    means = census.names.scores["sink"]
    row = domains[(domains.layer == 1) & (domains["head"] == 2)].set_index("domain")
    assert row.loc["prose", "sink"] == pytest.approx(float(means[:2, 1, 2].mean()), abs=1e-6)
    assert row.loc["code", "sink"] == pytest.approx(float(means[2, 1, 2]), abs=1e-6)


@pytest.fixture(scope="module")
def prose_census(default_model) -> HeadCensus:
    prose = [
        text
        for texts in (TEXTS, HELD_OUT)
        for name, text in texts.items()
        if DOMAINS[name] == "prose"
    ]
    return eyechart.head_census(
        default_model, prose[:4], held_out=prose, layers=(11, 18), tokens=96, context=64
    )


def test_the_default_models_diagonal_head_is_a_map_of_each_token_by_itself(prose_census):
    at = (11, 6)
    assert prose_census.names.kinds()[11][6] == "diagonal"
    identity, zero = (float(prose_census.trials.cost(n)[at]) for n in ("identity", "zero"))
    assert identity < 0.02 and zero > 2 * identity
    assert (11, 6, "identity") in prose_census.no_ops(budget=0.025)


def test_a_sink_head_of_the_default_model_can_be_zeroed(prose_census):
    mass, zero = prose_census.names.score("sink")[18], prose_census.trials.cost("zero")[18]
    head = int(mass.argmax())
    assert float(mass[head]) > 0.99 and float(zero[head]) < 0.005
    assert prose_census.names.kinds()[18][head] == "sink"
    assert prose_census.trials.verdicts(0.01)[18][head] == ("no-op", "zero")
