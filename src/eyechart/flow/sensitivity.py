"""The truth by derivative: how far the target moves when an input embedding is nudged.

The Frobenius norm of the Jacobian J_i = d y / d v_i, for all positions i at once, from random
vector-Jacobian products: with u ~ N(0, I), the mean of |J_i^T u|^2 is |J_i|_F^2 (Hutchinson). One
graph serves all of them.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eyechart.errors import CaptureError, InputError
from eyechart.kernels import AttentionCall, differentiable
from eyechart.models import facts_of
from eyechart.probes import hook_names
from eyechart.probes.forward import thrift
from eyechart.probes.plan import fusable
from eyechart.probes.seam import edits_of, taken_over
from eyechart.results import Sequences

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_TOKENS = 4096  # in one graph
_Z = 2.5758293035489004  # of a two-sided 99% interval


def check_differentiable(model: "TransformerBridge") -> None:
    """Refuse a model whose derivatives cannot be had, before a pass over the text is paid for.

    Raises:
        InputError: the model is in training mode.
        CaptureError: a part of it passes no gradient on, as quantised weights do not.
    """
    if model.training:
        raise InputError(
            "the model is in training mode, where dropout makes derivatives random; call "
            "model.eval() first"
        )
    # Once for the same weights in the same modules.
    state = (facts_of(model), tuple(map(id, model.modules())))
    if _PASSED.get(model) == state:
        return
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device)
    with _watched(model):
        leaf, target = _graph(model, tokens, None)
    try:
        torch.autograd.grad(target[:, -1].sum(), leaf)
    except RuntimeError as problem:
        raise CaptureError(f"no derivative can be taken: {problem}") from problem
    _PASSED[model] = state


_PASSED: "weakref.WeakKeyDictionary[TransformerBridge, object]" = weakref.WeakKeyDictionary()


def sensitivity(
    model: "TransformerBridge",
    sequences: Sequences,
    query: Int[Tensor, " batch"],
    target: int | None,
    probes: int | None,
    batch_size: int | None,
    seed: int,
) -> tuple[Float[Tensor, "batch position"], Float[Tensor, "batch position"], int]:
    """Frobenius norm of d y / d v_i for every position, half width of its 99% interval, and graphs.

    Args:
        model: In evaluation mode.
        sequences: The tokens; rows of a batch do not see each other.
        query: Position of y in each sequence.
        target: Block out of which y is read; None for the final norm's output.
        probes: Random vectors; None takes every unit vector, which is exact.
        batch_size: Sequences a graph; by default what 4,096 tokens hold.
        seed: Of the random vectors.
    """
    total, length = sequences.tokens.shape
    size = batch_size or max(1, _TOKENS // length)
    parts = []
    for first in range(0, total, size):
        rows = slice(first, first + size)
        at = query[rows]
        leaf, out = _graph(model, sequences.tokens[rows].to(model.cfg.device), target)
        y = out[torch.arange(len(at)), at.to(out.device)]
        found = []
        for u in _vectors(y, probes, seed + first):
            (pulled,) = torch.autograd.grad(y, leaf, u, retain_graph=True)
            wide = pulled.to(torch.promote_types(pulled.dtype, torch.float32))
            found.append(wide.square().sum(dim=-1).cpu().double())
        parts.append(torch.stack(found))
    squares = torch.cat(parts, dim=1)
    value, half = interval(squares) if probes is not None else _exact(squares)
    kind = torch.promote_types(facts_of(model).dtype, torch.float32)
    return value.to(kind), half.to(kind), len(parts)


def _exact(squares: Float[Tensor, "d_model batch position"]) -> tuple[Tensor, Tensor]:
    value = squares.sum(dim=0).sqrt()
    return value, torch.zeros_like(value)


def interval(
    squares: Float[Tensor, "probe batch position"],
) -> tuple[Float[Tensor, "batch position"], Float[Tensor, "batch position"]]:
    """Root of the mean of squares, and the half width of a 99% interval around it.

    A sum of squares of Gaussians is nearly a multiple of chi-squared with as many degrees of
    freedom as its mean and variance ask for (Satterthwaite), at least one a probe; its quantiles
    are Wilson and Hilferty's. Positions share what is known of the variance, since each has few
    probes. The wider side of the interval is taken for both.
    """
    count = squares.shape[0]
    mean = squares.mean(dim=0)
    if count == 1:
        relative = torch.full_like(mean, 2.0)
    else:
        own = squares.var(dim=0) / mean.square()  # NaN where nothing arrives
        pooled = own.nanmedian(dim=-1, keepdim=True).values
        relative = ((own + pooled) / 2).clamp(max=2.0).nan_to_num()  # 2: a Jacobian of rank one
    degrees = 2 * count / relative.clamp(min=1e-12)
    spread = 2 / (9 * degrees)
    low, high = ((1 - spread + z * spread.sqrt()).clamp(min=1e-3) ** 3 for z in (-_Z, _Z))
    root = mean.sqrt()
    half = torch.maximum(root / low.sqrt() - root, root - root / high.sqrt())
    return root, half


def _vectors(
    y: Float[Tensor, "batch d_model"], probes: int | None, seed: int
) -> Iterator[Float[Tensor, "batch d_model"]]:
    if probes is None:
        for unit in torch.eye(y.shape[-1], dtype=y.dtype, device=y.device):
            yield unit.expand_as(y)
    else:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(probes):
            yield torch.randn(y.shape, generator=draw, dtype=torch.float32).to(y)


def _graph(
    model: "TransformerBridge",
    tokens: Int[Tensor, "batch position"],
    target: int | None,
) -> tuple[Float[Tensor, "batch position d_model"], Float[Tensor, "batch position d_model"]]:
    """A forward pass that can be gone back through: stream into the first block, and target.

    Attention runs as torch's own where it can be taken over, so that no pattern is kept.
    """
    facts = facts_of(model)
    seen: dict[str, Tensor] = {}

    def enter(stream: Tensor, hook: object) -> Tensor:
        seen["leaf"] = stream.detach().requires_grad_()
        return seen["leaf"]

    def keep(stream: Tensor, hook: object) -> None:
        seen["target"] = stream

    end = hook_names(model, "final_norm" if target is None else "resid_post")[target]
    hooks = [(hook_names(model, "resid_pre")[0], enter), (end, keep)]
    layers, _ = fusable(model, facts, ())

    def attend(layer: int, call: AttentionCall) -> Tensor:
        for edit in edits_of(model):
            edit(layer, call)
        return differentiable(call)

    everywhere = len(layers) == len(facts.attention_layers)
    seam = taken_over(model, sorted(layers), everywhere, attend)
    with _frozen(model), torch.enable_grad(), model.hooks(fwd_hooks=hooks), seam:
        model(tokens, return_type=None, **thrift(model))
    return seen["leaf"], seen["target"]


@contextmanager
def _watched(model: "TransformerBridge") -> Iterator[None]:
    """Refuse, by name, a part through which autograd knows no way back to what went in.

    Asked of every part, because a gap beside another way back, such as values or experts that are
    quantised where queries and routers are not, leaves a derivative that only looks right.
    """

    def look(name: str, inputs: object, output: object) -> None:
        went_in = next((x for x in _tensors(inputs) if x.requires_grad), None)
        came_out = _tensors(output)
        if went_in is None or not came_out or not torch.is_grad_enabled():
            return
        ends = [x.sum() for x in came_out if x.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of operators that have no derivative
            back = [None]
            if ends:
                back = torch.autograd.grad(ends, went_in, retain_graph=True, allow_unused=True)
        if back[0] is not None:
            return
        raise CaptureError(
            f"{name.replace('_original_component', '').replace('..', '.').strip('.')} of "
            f"{facts_of(model).name} passes no gradient on (quantised or detached weights); load "
            "the model in a floating-point format"
        )

    beyond = set(model.unembed.modules())  # the target comes before it
    with ExitStack() as undo:
        for name, module in model.original_model.named_modules():
            wraps = hasattr(module, "original_component") or ".hook_" in name
            if not wraps and module not in beyond:
                handle = module.register_forward_hook(
                    lambda _, args, named, output, name=name: look(name, (args, named), output),
                    with_kwargs=True,
                )
                undo.callback(handle.remove)
        yield


def _tensors(whole: object) -> list[Tensor]:
    """Floating-point tensors among a module's arguments or results."""
    if isinstance(whole, Tensor):
        return [whole] if whole.is_floating_point() else []
    if isinstance(whole, dict):
        whole = tuple(whole.values())
    return [x for part in whole for x in _tensors(part)] if isinstance(whole, tuple | list) else []


@contextmanager
def _frozen(model: "TransformerBridge") -> Iterator[None]:
    """No derivative is wanted for weights, and none should be prepared for."""
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
