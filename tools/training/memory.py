"""memory_of_stage: an estimate of the bytes that a stage of fine-tuning needs on a GPU.

Nothing is allocated: activations are counted by running the model on tensors that have shapes and
no numbers, once with few tokens and once with twice as many. They are those of eager PyTorch with
our kernels, which keep q, k, v, their output and its logsumexp. A compiled model keeps less, and
PyTorch's allocator needs some per cent more than is alive.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from layers import Context
from recipes import Stage
from tools.training.losses import PIECE
from zoo import CausalLM

_FEW = 64  # tokens
_WIDE = 4  # bytes of float32


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU, of a model that is not sharded.

    Attributes:
        weights: of the student.
        teacher: its weights; 0 without one.
        gradients: of what trains.
        optimizer: both moments of AdamW.
        activations: what the backward pass needs of the forward pass.
        losses: a piece of logits and what is made of it.
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int
    losses: int

    @property
    def total(self) -> int:
        """All together: not everything is there at once, so it is rather too much."""
        return sum(vars(self).values())


def memory_of_stage(
    model: CausalLM, stage: Stage, rows: int, *, checkpointing: bool, teacher: int
) -> Memory:
    """An estimate for one GPU, without sharding.

    Args:
        model: made in a `FakeTensorMode` which is still on, and prepared for the stage.
        stage: what trains.
        rows: rows at a time.
        checkpointing: blocks are computed again in the backward pass.
        teacher: bytes of the teacher's weights.
    """
    tokens = rows * stage.context
    return Memory(
        **state_bytes(model),
        teacher=teacher if stage.needs_teacher else 0,
        activations=int(_activations(model, stage, checkpointing) * tokens),
        losses=_loss_bytes(model, stage, tokens),
    )


def state_bytes(model: nn.Module) -> dict[str, int]:
    """Weights, gradients and moments of a model that is prepared for a stage, as in `Memory`."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": trained * _WIDE,
        "optimizer": 2 * trained * _WIDE,
    }


def converted_layers(model: CausalLM) -> list[int]:
    """The layers that EVA or windows have taken the place of full attention in."""
    kinds = ("eva_attention", "window_attention")
    return [layer for layer, kind in enumerate(model.config.layer_types) if kind in kinds]


def _activations(model: CausalLM, stage: Stage, checkpointing: bool) -> float:
    """Bytes per token that a backward pass needs."""
    attends = [model.get_submodule(f"layers.{i}.attention") for i in range(len(model.layers))]
    own = [attention.attend for attention in attends]
    try:
        for attention in attends:
            attention.attend = _Kernel(attention.get_submodule("attend"))
        few, more = (_saved(model, stage, n, checkpointing) for n in (_FEW, 2 * _FEW))
    finally:
        for attention, attend in zip(attends, own, strict=True):
            attention.attend = attend
    return (more - few) / _FEW  # what does not depend on tokens is copies of weights


def _saved(model: CausalLM, stage: Stage, tokens: int, checkpointing: bool) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    context = Context.of(ids, None, None, None)
    converted = converted_layers(model)
    only_attention = set(stage.weights) == {"attention_mse"}
    aligned: list[int] = []
    blocks: list[int] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=stage.dtype == "bfloat16"):
        before = _Saved(model)
        with before:
            x = model.embed(ids)
        for layer, rope in enumerate(model.rotary(context, x.dtype)):
            block = model.layers[layer]
            if layer in converted and "attention_mse" in stage.weights:
                norm = model.get_submodule(f"layers.{layer}.input_layernorm")
                with (saved := _Saved(model)):
                    out = model.get_submodule(f"layers.{layer}.attention")(
                        norm(x.detach()), rope, context
                    )
                    out.float().square().mean(-1)
                aligned.append(saved.nbytes)
            if not only_attention:
                with (saved := _Saved(model)):
                    following = block(x, rope, context)
                blocks.append(saved.nbytes)
                x = following
        if only_attention:
            return sum(aligned)
        with (saved := _Saved(model)):
            model.norm(x)
    inside = x.nbytes * len(blocks) + max(blocks) if checkpointing else sum(blocks)
    return before.nbytes + inside + saved.nbytes + sum(aligned)


class _Saved:
    """A context that counts the bytes which autograd keeps, but for parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.nbytes = 0
        self._known = {id(p.untyped_storage()): p for p in model.parameters()}
        self._seen: list[torch.UntypedStorage] = []  # alive, so that no other takes their place
        self._hooks = saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if id(storage) not in self._known and all(storage is not s for s in self._seen):
            self._seen.append(storage)
            self.nbytes += storage.nbytes()
        return x

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *args: object) -> None:
        self._hooks.__exit__(*args)


class _Kernel(nn.Module):
    """Stands for any attention and keeps what our kernels keep."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.trains = any(p.requires_grad for p in attend.parameters())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: None) -> Tensor:
        if self.trains and not q.requires_grad:  # gradients begin at its own parameters
            q = q.detach().requires_grad_()
        if torch.is_autocast_enabled("cpu"):
            low = torch.get_autocast_dtype("cpu")
            q, k, v = q.to(low), k.to(low), v.to(low)
        return _Keep.apply(q, k, v)  # type: ignore[no-untyped-call]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        raise NotImplementedError("it only counts")


def _loss_bytes(model: CausalLM, stage: Stage, tokens: int) -> int:
    """Of `head_losses`: tensors of a piece of logits, and the gradients that it keeps."""
    # Alive at once: logits, log-probabilities and the gradient; with a teacher its own, too.
    logits = min(PIECE, tokens * model.lm_head.out_features) * _WIDE
    tensors = {"cross_entropy": 3, "logit_kl": 6}
    most = max((tensors.get(name, 0) for name in stage.weights), default=0)
    if most == 0:
        return 0
    head = model.lm_head
    hidden = tokens * head.in_features * _WIDE
    # The sum over the pieces before and after one, and in bfloat16 what that one adds.
    weight = head.weight.numel() * (2 * _WIDE + 2) if head.weight.requires_grad else 0
    return most * logits + hidden + weight
