"""Objective: what a stage minimises, as a module from a batch to sums over its tokens.

    objective = sum over losses l of  weight_l * (sum over tokens of l) / number of tokens

Tokens that count have a label. Their number is that of a whole step, over all micro-batches and
processes, so however a batch is divided, gradients are the same.

`compile_parts` compiles what a step is made of, each kind of part once. A graph of all of it,
which `torch.compile` can make too, has every layer of student and teacher in it: that takes
minutes.

The teacher is no submodule: it does not train, is not sharded and is in no checkpoint.

Dims: B rows, T tokens.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from recipes import LossName, Stage
from tools.training.alignment import Alignment
from tools.training.logit_pieces import IGNORED
from tools.training.losses import Teacher, head_losses
from zoo import CausalLM
from zoo.causal_lm import Block
from zoo.compile_apart import Backend, compile_apart
from zoo.compiled_blocks import run_block


class Objective(nn.Module):
    """The losses of a stage.

    Args:
        student: what trains.
        teacher: the model as published, for the losses that compare with it, or None.
        stage: weights of the losses and the temperature.

    Raises:
        ValueError: a teacher that is missing, or nothing to align.
    """

    def __init__(self, student: CausalLM, teacher: CausalLM | None, stage: Stage) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # hidden from nn.Module
        self._backend: Backend | None = None
        self._blocks: Sequence[Block] | None = None
        self._teacher_blocks: Sequence[Block] | None = None
        self._temperature = stage.temperature
        self._head: dict[LossName, float] = {
            name: weight for name, weight in stage.loss if name != "attention_mse"
        }
        self._attention = stage.weights.get("attention_mse", 0.0)
        self._alignment: Alignment | None = None
        if stage.needs_teacher and teacher is None:
            raise ValueError(f"stage {stage.name!r} compares with a teacher, and there is none")
        if self._attention:
            assert teacher is not None
            self._alignment = Alignment(student, teacher)
            if not self._alignment.layers:
                raise ValueError(
                    f"stage {stage.name!r}: 'attention_mse' compares converted layers, and the "
                    "model has none"
                )

    def forward(
        self, ids: Tensor, labels: Tensor, seq_start: Tensor
    ) -> tuple[Tensor, dict[LossName, Tensor]]:
        """Sums over the tokens that have a label.

        Args:
            ids, labels: int64 [B, T]; a label of -100 does not count.
            seq_start: int32 [B, T].

        Returns:
            The weighted sum of all losses, which has a gradient, and each loss without weight or
            gradient: scalars, float32 at least.
        """
        total: Tensor | None = None
        losses: dict[LossName, Tensor] = {}
        mask, taught = labels != IGNORED, None
        if self._alignment is not None:
            if "logit_kl" in self._head:  # the teacher runs once for both
                aligned, taught = self._alignment.loss_and_hidden(ids, seq_start, mask)
            else:
                aligned = self._alignment.loss(ids, seq_start, mask)
            losses["attention_mse"] = aligned.total.detach()
            total = self._attention * aligned.total
        if self._head:
            hidden = self.student.hidden_states(ids, seq_start=seq_start, blocks=self._blocks)
            found = head_losses(
                hidden,
                self.student.lm_head,
                labels,
                weights=self._head,
                teacher=self._taught(ids, seq_start, taught),
                temperature=self._temperature,
                backend=self._backend,
            )
            losses |= {name: loss.total for name, loss in found.losses.items()}
            objective = found.objective.total
            total = objective if total is None else total + objective
        assert total is not None
        return total, losses

    def compile_parts(self, backend: Backend = "inductor", *, sharded: bool = False) -> None:
        """From now on blocks, the comparison of a layer, and pieces of logits run in graphs.

        Each kind has one. The teacher's blocks run as they are where their attention is compared.
        Those of a student that is `sharded` are compiled as modules: FSDP's hooks, which make
        their parameters whole, are not traced.
        """
        (teacher,) = self._teacher
        self._backend = backend
        if sharded:
            for block in self.student.layers:
                block.compile(fullgraph=True, backend=backend)
        else:
            self._blocks = _compiled_blocks(self.student, backend)
        if self._alignment is not None:
            self._alignment.compile_parts(backend)
        elif teacher is not None:
            self._teacher_blocks = _compiled_blocks(teacher, backend)

    def close(self) -> None:
        """Takes the hooks off the teacher."""
        if self._alignment is not None:
            self._alignment.close()

    def _taught(self, ids: Tensor, seq_start: Tensor, hidden: Tensor | None) -> Teacher | None:
        """What `logit_kl` compares with, if it counts; `hidden` if it is known already."""
        if "logit_kl" not in self._head:
            return None
        (teacher,) = self._teacher
        assert teacher is not None
        if hidden is None:
            with torch.no_grad():
                hidden = teacher.hidden_states(
                    ids, seq_start=seq_start, blocks=self._teacher_blocks
                )
        return Teacher(hidden, teacher.lm_head)


def _compiled_blocks(model: CausalLM, backend: Backend) -> list[Block]:
    """Blocks of one kind share a graph: its parameters are inputs of it."""
    kinds = model.config.layer_types
    runs = {kind: compile_apart(run_block, dynamic=False, backend=backend) for kind in set(kinds)}
    return [partial(runs[kind], block) for kind, block in zip(kinds, model.layers, strict=True)]
