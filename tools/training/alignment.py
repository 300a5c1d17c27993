"""Alignment: the outputs of a student's attention against those of its teacher, layer by layer.

Teacher forcing: every layer is given the hidden state that the teacher has there, so that a
layer's error is its own, and layers learn independently of each other. Of a layer l with hidden
states x_l of the teacher,

    attention_mse_l = mean over E of (attention_l(norm_l(x_l)) - the teacher's)^2

where both attentions are compared behind their output projections. Layers that are not converted
(exact ones, and those that slide in the published model) are left out. The loss is the sum over
tokens of the mean over the layers compared.

It needs of a family only that a block is called as `block(x, rope, context)` and that its
attention is `block.attention(block.input_layernorm(x), rope, context)`: so it is for all of them.

The teacher's blocks run once, and a hook on their attention keeps what it returned: inside a
block, norms and parallel MLPs follow it in ways that differ between families. The student's blocks
do not run, only their norm and attention. Under FSDP2 these two must therefore be a group of
parameters of their own: `fully_shard([block.input_layernorm, block.attention])`.

Dims: B rows, T tokens, E hidden, L layers.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from layers import Context, RotaryAngles
from tools.training.losses import TokenSum
from zoo import CausalLM
from zoo.compile_apart import Backend, compile_apart

Error = Callable[
    [nn.Module, nn.Module, Tensor, RotaryAngles, Context, Tensor, Tensor | None], Tensor
]


class Alignment:
    """Compares a student with its teacher. It holds hooks: `close` it, or use it in a `with`.

    Args:
        student: some of whose layers are converted.
        teacher: the same model as published; it gets no gradient. May be in another dtype.

    Raises:
        ValueError: models of different depth or width.
    """

    def __init__(self, student: CausalLM, teacher: CausalLM) -> None:
        for size in ("num_hidden_layers", "hidden_size"):
            ours, theirs = getattr(student.config, size), getattr(teacher.config, size)
            if ours != theirs:
                raise ValueError(f"the student has {size} {ours}, but its teacher has {theirs}")
        self.student, self.teacher = student, teacher
        self.layers = aligned_layers(student, teacher)
        self._errors: dict[str, Error] = {}
        self._keep = _Keep()
        self._hooks = [
            _attention(teacher, layer).register_forward_hook(self._keep) for layer in self.layers
        ]

    def loss(
        self, ids: Tensor, seq_start: Tensor | None = None, mask: Tensor | None = None
    ) -> TokenSum:
        """The loss of all layers, whose graphs are alive together.

        Args:
            ids: int64 [B, T].
            seq_start: int [B, T], as `CausalLM.forward`.
            mask: bool [B, T], the tokens that count; None: all.
        """
        # What follows the last layer that is compared changes nothing.
        loss, _ = self._run(ids, seq_start, mask, max(self.layers, default=-1) + 1)
        return loss

    def loss_and_hidden(
        self, ids: Tensor, seq_start: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[TokenSum, Tensor]:
        """The loss, and the teacher's `hidden_states`, of one pass; arguments as `loss`."""
        loss, x = self._run(ids, seq_start, mask, len(self.teacher.layers))
        with torch.no_grad():
            return loss, self.teacher.norm(x)

    def _run(
        self, ids: Tensor, seq_start: Tensor | None, mask: Tensor | None, depth: int
    ) -> tuple[TokenSum, Tensor]:
        """The loss over the first `depth` layers, and what the teacher has behind them."""
        total = torch.zeros((), device=ids.device, dtype=_wide(self.student))
        dtype = self.student.embed_tokens.weight.dtype
        context = Context.of(ids, None, seq_start, None)
        with torch.no_grad():
            x = self.teacher.embed(ids)
            ropes = self.teacher.rotary(context, x.dtype)
            student_ropes = self.student.rotary(context, dtype)
        for layer in range(depth):
            with torch.no_grad():
                before = x
                self._keep.wanted = True
                x = self.teacher.layers[layer](before, ropes[layer], context)
                target = self._keep.taken()
            if target is None:
                continue
            error = self._errors.get(self.student.config.layer_types[layer], _error)(
                self.student.get_submodule(f"layers.{layer}.input_layernorm"),
                _attention(self.student, layer),
                before.to(dtype),
                student_ropes[layer],
                context,
                target,
                mask,
            )
            total = total + error / len(self.layers)
        return TokenSum(total, _count(ids, mask)), x

    def compile_parts(self, backend: Backend = "inductor") -> None:
        """From now on a layer is compared in a graph, which one kind of attention shares.

        The teacher's blocks are not compiled: graphs of theirs would not know their hooks apart.
        """
        kinds = {self.student.config.layer_types[layer] for layer in self.layers}
        self._errors = {
            kind: compile_apart(_error, dynamic=False, backend=backend) for kind in kinds
        }

    def close(self) -> None:
        """Takes the hooks off the teacher."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Keep:
    """A hook that keeps what a module returned, while that is wanted.

    Whoever else calls the teacher, such as for its logits, fills no memory with what nobody takes.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._output: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        if self.wanted:
            self._output = output

    def taken(self) -> Tensor | None:
        """What was kept, which then is wanted and kept no more."""
        output, self._output, self.wanted = self._output, None, False
        return output


def aligned_layers(student: CausalLM, teacher: CausalLM) -> tuple[int, ...]:
    """The layers whose attention is another than the teacher's."""
    types = zip(student.config.layer_types, teacher.config.layer_types, strict=True)
    return tuple(layer for layer, (ours, theirs) in enumerate(types) if ours != theirs)


def _attention(model: CausalLM, layer: int) -> nn.Module:
    return model.get_submodule(f"layers.{layer}.attention")


def _error(
    norm: nn.Module,
    attention: nn.Module,
    x: Tensor,
    rope: RotaryAngles,
    context: Context,
    target: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """What a block's attention makes of the block's input [B, T, E], against `target`: a sum."""
    wide = torch.promote_types(x.dtype, torch.float32)
    error = (attention(norm(x), rope, context).to(wide) - target.to(wide)).square().mean(-1)
    return (error if mask is None else torch.where(mask, error, 0)).sum()


def _wide(model: CausalLM) -> torch.dtype:
    return torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)


def _count(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.tensor(ids.numel(), device=ids.device) if mask is None else mask.sum()
