"""learn_gates: all layers relaxed at once, a gate for each between its two kinds of attention.

With frozen weights, layer l attends with

    g_l * exact(q, k, v) + (1 - g_l) * other(q, k, v),    g_l = sigmoid(a_l),

before its output projection. Adam changes the a_l alone, to make small

    -score / |score of the first step| + r * [max(0, sum_l g_l - budget) / budget]^2,

where r grows from 0 to 1 over the steps: at first gates follow the score, and in the end they have
to be few. The layers with the largest gates become exact. After FlashMorph (arXiv 2606.30562),
which regularises gates towards linear attention; the form of the penalty, its growth and the
normalisation are ours. A further penalty on gates that are neither 0 nor 1 was tried: it decides
for the gates that are largest early, whatever the score says later.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import Context
from layers.cache import LayerCache
from tools.placement.branches import Branches
from tools.placement.objectives import Batch, Objective
from tools.placement.sweep import sweep

_RATE = 0.1
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class GateStep:
    """Where the gates are after a step; all that the next one needs.

    Attributes:
        step: counted from 1.
        score: of the step's batch, with the gates before it.
        scale: |score| of the first step.
        logits: a_l of each layer.
        first, second: Adam's moments of each.
    """

    step: int
    score: float
    scale: float
    logits: list[float]
    first: list[float]
    second: list[float]

    @property
    def gates(self) -> list[float]:
        """g_l of each layer."""
        return torch.tensor(self.logits, dtype=torch.float64).sigmoid().tolist()


class GatedAttention(nn.Module):
    """Both kinds of attention of a layer, mixed by `gate`, a scalar from 0 to 1."""

    def __init__(self, exact: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.exact, self.other = exact, other
        self.gate = torch.tensor(0.5)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: LayerCache | None
    ) -> Tensor:
        """q: [B, H, T, D]; k, v: [B, G, T, D]; returns [B, H, T, D]."""
        gate = self.gate.to(q.dtype)
        exact, other = (x(q, k, v, context, cache) for x in (self.exact, self.other))
        return gate * exact + (1 - gate) * other


def learn_gates(
    branches: Branches,
    objective: Objective,
    *,
    budget: int,
    steps: int,
    batch_size: int,
    seed: int = 0,
    done: GateStep | None = None,
) -> Iterator[GateStep]:
    """Trains one gate per layer.

    Args:
        branches: the model; its weights are not changed.
        objective: what is good.
        budget: how many exact layers are wanted.
        steps: of Adam, one batch each.
        batch_size: rows of a batch.
        seed: of the order of batches.
        done: the last step of a run that was stopped; it goes on from there.

    Yields:
        Every step.

    Raises:
        ValueError: the score is not a finite number.
    """
    batches = list(objective.batches(batch_size))
    device = branches.model.device
    start = done or GateStep(0, 0.0, 0.0, *([0.0] * len(branches.layers) for _ in range(3)))
    logits = nn.Parameter(torch.tensor(start.logits, dtype=torch.float64, device=device))
    adam = torch.optim.Adam([logits], lr=_RATE, betas=_BETAS)
    adam.state[logits] = {
        "step": torch.tensor(float(start.step)),
        "exp_avg": logits.new_tensor(start.first),
        "exp_avg_sq": logits.new_tensor(start.second),
    }
    scale = start.scale
    for step in range(start.step + 1, steps + 1):
        batch = batches[_order(len(batches), seed, step)]
        score = _score(branches, objective, batch, logits.sigmoid())
        if not score.isfinite():
            raise ValueError("the score is not a finite number; try another dtype, as float32")
        scale = scale or max(abs(score.item()), 1e-12)
        loss = -score.double() / scale + step / steps * penalty(logits.sigmoid(), budget)
        adam.zero_grad()
        loss.backward()
        adam.step()
        state = adam.state[logits]
        yield GateStep(
            step,
            score.item(),
            scale,
            logits.tolist(),
            state["exp_avg"].tolist(),
            state["exp_avg_sq"].tolist(),
        )


def penalty(gates: Tensor, budget: int) -> Tensor:
    """What it costs that the gates [L] are too many."""
    return ((gates.sum() - budget).clamp(min=0) / budget) ** 2


def by_gate(layers: Sequence[int], gates: Sequence[float]) -> list[tuple[int, float]]:
    """Layers and their gates, the largest first."""
    pairs = zip(layers, gates, strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def _order(batches: int, seed: int, step: int) -> int:
    """Which batch a step reads: every one once, in an order of its own, before one comes again."""
    turn, place = divmod(step - 1, batches)
    keys = [random.Random(repr((seed, turn, batch))).random() for batch in range(batches)]
    return sorted(range(batches), key=keys.__getitem__)[place]


def _score(branches: Branches, objective: Objective, batch: Batch, gates: Tensor) -> Tensor:
    """The mean score of a batch, with a gradient with respect to the gates [L]."""
    model = branches.model
    ids = batch.ids.to(model.device)
    exact: Tensor | None = None
    if objective.needs_all:
        ((_, found),) = sweep(branches, ids, [branches.layers], rows=len(ids))
        exact = found.clone()  # what comes out of inference mode takes no part in a gradient
    with _gated(branches, gates), torch.enable_grad():
        context = Context.of(ids, None, None, None)
        x = model.embed(ids)
        for block, rope in zip(model.layers, model.rotary(context, x.dtype), strict=True):
            # Of a layer only its input is kept: 30 layers of 16,384 tokens take tens of GiB.
            x = checkpoint(block, x, rope, context, use_reentrant=False)
        values = objective.values(model.lm_head, batch, model.norm(x), exact)
        return _through(values["score"].mean(), gates)


def _through(score: Tensor, gates: Tensor) -> Tensor:
    """The score with its gradient computed now, while the gates are in their places."""
    (gradient,) = torch.autograd.grad(score, gates)
    return score.detach().double() + (gradient * (gates - gates.detach())).sum()


@contextmanager
def _gated(branches: Branches, gates: Tensor) -> Iterator[None]:
    """Frozen weights, and gates in every layer."""
    trained = [p for p in branches.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for gate, layer in zip(gates, branches.layers, strict=True):
            both = GatedAttention(branches.exact(layer), branches.other(layer))
            both.gate = gate
            branches.put(layer, both)
        yield
    finally:
        for layer in branches.layers:
            branches.choose(layer, exact=False)
        for parameter in trained:
            parameter.requires_grad_(True)
