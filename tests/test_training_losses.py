"""Losses of fine-tuning: equal to their plain definitions, in pieces, and small in memory."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from flasheva import EvaConfig
from layers import Context
from recipes import LossName, Stage
from tests.tiny import FAMILIES, SHORT_WINDOW, hf_config, make_model, mixed
from tools.training.alignment import Alignment, aligned_layers
from tools.training.losses import HeadLosses, Teacher, TokenSum, head_losses
from tools.training.objective import Objective
from tools.training.recompute import recompute_blocks
from zoo import CausalLM
from zoo.alive_bytes import AliveBytes

B, T, E, V = 2, 7, 6, 11
BOTH: dict[LossName, float] = {"logit_kl": 0.7, "cross_entropy": 0.3}
WEIGHTS: list[dict[LossName, float]] = [{"cross_entropy": 1.0}, {"logit_kl": 2.0}, BOTH]


class Case:
    """Hidden states, heads and labels, some of which do not count."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(B, T, E, dtype=dtype, requires_grad=True)
        self.head = nn.Linear(E, V, bias=bias, dtype=dtype)
        # A teacher may be wider.
        self.teacher = Teacher(
            torch.randn(B, T, E + 1, dtype=dtype), nn.Linear(E + 1, V).to(dtype)
        )
        self.labels = torch.randint(V, (B, T))
        self.labels[0, 2] = self.labels[1, 4:] = -100

    @property
    def inputs(self) -> list[Tensor]:
        return [self.hidden, *self.head.parameters()]

    def pieces(self, weights: dict[LossName, float], *, c: float = 1.0, piece: int) -> HeadLosses:
        return head_losses(
            self.hidden,
            self.head,
            self.labels,
            weights=weights,
            teacher=self.teacher,
            temperature=c,
            piece=piece,
        )

    def plain(self, weights: dict[LossName, float], c: float = 1.0) -> dict[LossName, Tensor]:
        """Sums of the losses from all logits, by PyTorch's own functions."""
        counts = self.labels.flatten() != -100
        s = self.head(self.hidden).flatten(0, 1)[counts]
        t = self.teacher.head(self.teacher.hidden).flatten(0, 1)[counts].detach()
        p, q = (s / c).log_softmax(-1), (t / c).log_softmax(-1)
        labels = self.labels.flatten()[counts]
        found: dict[LossName, Tensor] = {
            "cross_entropy": F.cross_entropy(s, labels, reduction="sum"),
            "logit_kl": c**2 * F.kl_div(p, q.exp(), reduction="sum"),
        }
        return {name: found[name] for name in weights}


@pytest.mark.parametrize("piece", [1, 4, 5, B * T, 1000])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["cross entropy", "kl", "both"])
@pytest.mark.parametrize("bias", [True, False])
def test_pieces_give_the_losses_and_gradients_of_all_logits(
    weights: dict[LossName, float], piece: int, bias: bool
) -> None:
    case, c = Case(bias=bias), 1.7
    found = case.pieces(weights, c=c, piece=piece)
    plain = case.plain(weights, c)
    assert found.losses.keys() == plain.keys()
    for name, loss in plain.items():
        torch.testing.assert_close(found.losses[name].total, loss.detach(), rtol=1e-12, atol=0)
        assert found.losses[name].count == (case.labels != -100).sum() == 10
        assert not found.losses[name].total.requires_grad
    objective = sum(weights[name] * loss for name, loss in plain.items())
    assert isinstance(objective, Tensor)
    torch.testing.assert_close(found.objective.total, objective, rtol=1e-12, atol=0)
    # Divided, as a mean is.
    wanted = torch.autograd.grad(objective / 3, case.inputs)
    got = torch.autograd.grad(found.objective.total / 3, case.inputs)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["cross entropy", "kl", "both"])
def test_gradients_are_those_of_finite_differences(weights: dict[LossName, float]) -> None:
    case = Case()

    def objective(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = nn.Linear(E, V, device="meta")
        del head.weight, head.bias
        head.weight, head.bias = weight, bias  # type: ignore[assignment]
        return head_losses(
            *(hidden, head, case.labels),
            weights=weights,
            teacher=case.teacher,
            temperature=0.8,
            piece=3,
        ).objective.total

    assert torch.autograd.gradcheck(objective, case.inputs)


def test_a_mean_over_ragged_batches_is_that_over_their_tokens() -> None:
    case = Case()
    whole = case.pieces(BOTH, piece=4).objective
    rows = [
        head_losses(
            case.hidden[row : row + 1],
            case.head,
            case.labels[row : row + 1],
            weights=BOTH,
            teacher=Teacher(case.teacher.hidden[row : row + 1], case.teacher.head),
        ).objective
        for row in range(B)
    ]
    assert [int(row.count) for row in rows] == [6, 4]
    together = TokenSum(rows[0].total + rows[1].total, rows[0].count + rows[1].count)
    torch.testing.assert_close(together.mean, whole.mean, rtol=1e-12, atol=0)


def test_tokens_without_a_label_change_nothing_whatever_they_are() -> None:
    case = Case()
    results = []
    for value in (0.0, 1e6, float("nan")):
        hidden = case.hidden.detach().clone()
        hidden[case.labels == -100] = value
        hidden.requires_grad_()
        found = head_losses(
            *(hidden, case.head, case.labels), weights=BOTH, teacher=case.teacher, piece=4
        ).objective.total
        gradient, *others = torch.autograd.grad(found, [hidden, *case.head.parameters()])
        assert (gradient[case.labels == -100] == 0).all()
        results.append((found, gradient, *others))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_no_labels_at_all_give_zero() -> None:
    case = Case()
    case.labels.fill_(-100)
    objective = case.pieces(BOTH, piece=4).objective
    objective.mean.backward()
    assert objective.mean == 0
    assert all((x.grad == 0).all() for x in case.inputs if x.grad is not None)


def test_kl_to_oneself_is_zero_and_so_is_its_gradient() -> None:
    case = Case()
    case.teacher = Teacher(case.hidden.detach(), case.head)
    found = case.pieces({"logit_kl": 1.0}, c=2.0, piece=4).objective.total
    assert found.abs() < 1e-14
    for gradient in torch.autograd.grad(found, case.inputs):
        assert gradient.abs().max() < 1e-14


def test_a_logit_of_the_teacher_may_be_minus_infinity() -> None:
    case = Case()
    with torch.no_grad():
        assert case.teacher.head.bias is not None
        case.teacher.head.bias[3] = -torch.inf
    found = case.pieces({"logit_kl": 1.0}, piece=4).objective.total
    torch.testing.assert_close(found, case.plain({"logit_kl": 1.0})["logit_kl"])
    assert all(x.isfinite().all() for x in torch.autograd.grad(found, case.inputs))


def test_frozen_weights_and_no_grad_make_no_gradient() -> None:
    case = Case()
    case.head.requires_grad_(False)
    total = case.pieces(BOTH, piece=4).objective.total
    (gradient,) = torch.autograd.grad(total, [case.hidden])
    case.head.requires_grad_(True)
    wanted = torch.autograd.grad(case.pieces(BOTH, piece=4).objective.total, [case.hidden])[0]
    assert torch.equal(gradient, wanted)
    with torch.no_grad():
        assert torch.equal(case.pieces(BOTH, piece=4).objective.total, total)


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(V, E, dtype=torch.float64)
    head = nn.Linear(E, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    ids = torch.randint(V, (B, T))
    labels = ids.roll(-1, 1)
    ours = head_losses(embedding(ids), head, labels, weights={"cross_entropy": 1.0}, piece=4)
    plain = F.cross_entropy(head(embedding(ids)).flatten(0, 1), labels.flatten(), reduction="sum")
    found, wanted = (
        torch.autograd.grad(x, [embedding.weight])[0] for x in (ours.objective.total, plain)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_low_precision_is_as_near_to_float64_as_plain_logits_are() -> None:
    """Twice the error of PyTorch's own functions on all logits, under the same autocast."""
    torch.manual_seed(0)
    n, width, vocab = 256, 64, 512
    hidden = torch.randn(1, n, width)
    weight = torch.randn(vocab, width) * 0.2
    labels = torch.randint(vocab, (1, n))

    def gradients(dtype: torch.dtype, low: bool, pieces: bool) -> list[Tensor]:
        x = hidden.to(dtype).requires_grad_()
        head = nn.Linear(width, vocab, bias=False, dtype=dtype)
        head.weight.data.copy_(weight)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if pieces:
                loss = head_losses(x, head, labels, weights={"cross_entropy": 1.0}, piece=32)
                total = loss.objective.total
            else:
                logits = head(x)[0].to(torch.promote_types(dtype, torch.float32))
                total = F.cross_entropy(logits, labels[0], reduction="sum")
        return [total.detach(), *torch.autograd.grad(total, [x, head.weight])]

    truth = gradients(torch.float64, low=False, pieces=False)
    for dtype, low in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        plain, ours = gradients(dtype, low, pieces=False), gradients(dtype, low, pieces=True)
        for exact, theirs, found in zip(truth, plain, ours, strict=True):
            assert found.dtype == theirs.dtype
            error = (found - exact).norm() / exact.norm()
            assert error <= 2 * (theirs - exact).norm() / exact.norm() + torch.finfo(dtype).eps


def test_gradients_of_a_mean_in_bfloat16_are_rounded_once() -> None:
    """1 / 3 in bfloat16 is 0.2% too large, and so would be all gradients."""
    case = Case(dtype=torch.bfloat16)
    total, again = (case.pieces(BOTH, piece=4).objective.total for _ in range(2))
    sums = torch.autograd.grad(total, case.inputs)
    means = torch.autograd.grad(again / 3, case.inputs)
    for of_sum, of_mean in zip(sums, means, strict=True):
        assert torch.equal(of_mean, (of_sum.float() * (torch.ones(()) / 3)).bfloat16())


@pytest.mark.parametrize("weights", WEIGHTS, ids=["cross entropy", "kl", "both"])
def test_logits_of_a_batch_never_exist_at_once(weights: dict[LossName, float]) -> None:
    tokens, width, vocab = 1024, 8, 2048
    all_logits = tokens * vocab * 4  # bytes, in float32
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    head = nn.Linear(width, vocab)
    teacher = Teacher(torch.randn(1, tokens, width), nn.Linear(width, vocab))
    labels = torch.randint(vocab, (1, tokens))

    def peak(piece: int) -> int:
        with AliveBytes() as alive:
            loss = head_losses(
                *(hidden, head, labels), weights=weights, teacher=teacher, piece=piece
            )
            loss.objective.total.backward()
        return alive.peak

    assert peak(32) < all_logits / 2
    assert peak(tokens) > 2 * all_logits  # the measure sees them


def test_the_default_piece_is_of_bounded_size() -> None:
    tokens, vocab = 2**16, 2**11
    hidden = torch.randn(1, tokens, 1)
    head = nn.Linear(1, vocab, bias=False).requires_grad_(False)
    labels = torch.zeros(1, tokens, dtype=torch.int64)
    labels[0, 5000:] = -100
    with torch.no_grad(), AliveBytes() as alive:
        head_losses(hidden, head, labels, weights={"cross_entropy": 1.0})
    assert alive.peak < 4 * 2**26 * 4 < 4 * tokens * vocab * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_tied_model_and_its_losses_compile_whole(dtype: torch.dtype) -> None:
    """Both models in one graph, with a last piece that is smaller; bfloat16 under autocast."""
    torch._dynamo.reset()
    low = dtype == torch.bfloat16
    student, teacher = (
        make_model(values, dtype=torch.float32 if low else dtype)
        for values in (
            mixed("llama", tie_word_embeddings=True),
            hf_config("llama", tie_word_embeddings=True),
        )
    )
    teacher.requires_grad_(False)
    ids = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -5:] = -100

    def step(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            of_teacher = Teacher(teacher.hidden_states(ids), teacher.lm_head)
        found = head_losses(
            *(student.hidden_states(ids), student.lm_head, labels),
            weights=BOTH,
            teacher=of_teacher,
            piece=20,
        ).objective
        return found.total, found.count

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            total, count = run(ids, labels)
        (total / count).backward()
        grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        results.append((total.detach(), count, torch.cat(grads)))
    # Eager autocast keeps a weight's copy in bfloat16 and sums the gradients of both its uses in
    # it, a compiled graph makes two: roundings differ, by some 2^-8 of the numbers.
    (eager, count, gradient), (compiled, same, other) = results
    assert count == same == 2 * 19
    assert (eager - compiled).abs() <= (2**-7 if low else 1e-12) * eager.abs()
    assert (gradient - other).norm() <= (2**-6 if low else 1e-12) * gradient.norm()


def test_pieces_are_regions_of_a_graph_not_unrolled_into_it() -> None:
    """A usual batch has 24 of them, which would be compiled one by one."""
    case = Case()
    seen: list[tuple[int, int]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        (body,) = (
            m
            for name, m in graph.named_modules()
            if name.startswith("fwd_body_") and "." not in name
        )
        assert isinstance(body, torch.fx.GraphModule)
        targets = [str(node.target) for node in body.graph.nodes]
        seen.append((targets.count("invoke_subgraph"), sum("softmax" in t for t in targets)))
        return graph

    def losses(hidden: Tensor, piece: int) -> Tensor:
        return head_losses(
            *(hidden, case.head, case.labels), weights={"cross_entropy": 1.0}, piece=piece
        ).objective.total

    for piece in (7, 2):
        torch._dynamo.reset()
        torch.compile(losses, fullgraph=True, backend=backend)(case.hidden, piece)
    assert seen == [(2, 0), (7, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {}}, "weights must be of 'cross_entropy', 'logit_kl' or both, not []"),
        ({"weights": {"attention_mse": 1.0}}, "weights must be of 'cross_entropy', 'logit_kl' or"),
        ({"labels": torch.zeros(B, T + 1)}, "hidden must be [B, T, E] and labels [B, T], not"),
        ({"teacher": None}, "'logit_kl' needs a teacher"),
        (
            {"teacher": Teacher(torch.zeros(B, T, E), nn.Linear(E, V + 1))},
            "the teacher has 12 logits, the student 11: distillation needs the same vocabulary",
        ),
        (
            {"teacher": Teacher(torch.zeros(B, T + 1, E), nn.Linear(E, V))},
            "the teacher's hidden states are [2, 8, 6], but labels are [2, 7]",
        ),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"piece": 0}, "piece must be at least 1 token, not 0"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, object], message: str) -> None:
    case = Case()
    arguments = {"labels": case.labels, "weights": BOTH, "teacher": case.teacher} | change
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        head_losses(case.hidden, case.head, **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


# Alignment

WIDE = EvaConfig(window_size=64, chunk_size=16)  # all 48 tokens are seen exactly
NARROW = EvaConfig(window_size=8, chunk_size=4)
TOKENS = 48
ALL = (*FAMILIES, "gemma3_text")


def pair(
    family: str, eva: EvaConfig, kinds: tuple[str, str, str] | None = None
) -> tuple[CausalLM, CausalLM]:
    """A student of three layers and its teacher, with the same weights, in float64."""
    gemma = family == "gemma3_text"
    full = ("sliding_attention" if gemma else "full_attention", "full_attention", "full_attention")
    if kinds is None:
        kinds = (full[0] if gemma else "eva_attention", "full_attention", "eva_attention")
    fields: dict[str, object] = {"eva": eva.to_dict()}
    if gemma:
        fields |= {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8}
    student, teacher = (
        make_model(hf_config(family, layer_types=list(types), **fields), dtype=torch.float64)
        for types in (kinds, full)
    )
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student, teacher


def some_ids() -> Tensor:
    return torch.randint(100, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def plainly(student: CausalLM, teacher: CausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """The loss as it is defined, with hooks that keep everything."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in teacher.layers:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.attention.register_forward_hook(lambda _, args, out: outputs.append(out))  # type: ignore[union-attr]
    with torch.no_grad():
        teacher(ids)
    context = Context.of(ids, None, None, None)
    ropes = student.rotary(context, torch.float64)
    errors = []
    for layer, kind in enumerate(student.config.layer_types):
        if kind not in ("eva_attention", "window_attention"):
            continue
        block = student.layers[layer]
        y = block.input_layernorm(inputs[layer])  # type: ignore[operator]
        y = block.attention(y, ropes[layer], context)  # type: ignore[operator]
        errors.append((y - outputs[layer]).square().mean(-1)[mask].sum())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("family", ALL)
def test_alignment_is_the_mean_square_of_what_attention_returns(family: str) -> None:
    student, teacher = pair(family, NARROW)
    ids = some_ids()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    with Alignment(student, teacher) as alignment:
        loss = alignment.loss(ids, mask=mask)
    assert loss.count == mask.sum()
    wanted = plainly(student, teacher, ids, mask)
    assert wanted > 1e-4
    torch.testing.assert_close(loss.total, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ALL)
def test_alignment_is_zero_where_nothing_is_converted(family: str) -> None:
    _, teacher = pair(family, NARROW)
    _, same = pair(family, NARROW)
    with Alignment(same, teacher) as alignment:
        loss = alignment.loss(some_ids())
        assert alignment.layers == ()
    assert loss.total == 0
    assert loss.count == 2 * TOKENS


@pytest.mark.parametrize("family", ALL)
def test_alignment_is_zero_where_the_window_holds_everything(family: str) -> None:
    student, teacher = pair(family, WIDE)
    with Alignment(student, teacher) as alignment:
        assert len(alignment.layers) == (1 if family == "gemma3_text" else 2)
        assert alignment.loss(some_ids()).total < 1e-25


def test_every_layer_is_given_what_the_teacher_has_there() -> None:
    """An error in one layer of the student changes nothing in the next ones."""
    student, teacher = pair("llama", NARROW, ("eva_attention", "eva_attention", "eva_attention"))
    queries = [layer.attention.q_proj.weight for layer in student.layers]  # type: ignore[union-attr]
    gradients = []
    with Alignment(student, teacher) as alignment:
        for _ in range(2):
            total = alignment.loss(some_ids()).total
            gradients.append(torch.autograd.grad(total, queries))  # type: ignore[arg-type]
            with torch.no_grad():
                student.layers[0].attention.o_proj.weight.add_(1.0)  # type: ignore[union-attr, operator]
                student.layers[0].mlp.down_proj.weight.add_(1.0)  # type: ignore[union-attr, operator]
    changed = [not torch.equal(one, other) for one, other in zip(*gradients, strict=True)]
    assert changed == [True, False, False]


@pytest.mark.parametrize("family", ALL)
def test_alignment_reaches_the_attention_of_converted_layers_only(family: str) -> None:
    student, teacher = pair(family, NARROW)
    chosen = {
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad_(".attention." in name).requires_grad
    }
    with Alignment(student, teacher) as alignment:
        alignment.loss(some_ids()).total.backward()
    converted = {f"layers.{layer}." for layer in alignment.layers}
    expected = {name for name in chosen if name[: len("layers.0.")] in converted}
    reached = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    # Keys have no use for a bias: softmax does not see it. What is left may be 0 by rounding.
    assert reached <= expected
    assert {n for n in expected if "k_proj.bias" not in n} <= reached
    assert all(p.grad is None for p in teacher.parameters())


def test_packed_documents_align_as_they_do_alone() -> None:
    student, teacher = pair("gpt_neox", NARROW)
    ids = some_ids()[:1]
    start = torch.zeros_like(ids)
    start[:, 16:] = 16
    with Alignment(student, teacher) as alignment:
        packed = alignment.loss(ids, start).total
        alone = alignment.loss(ids[:, :16]).total + alignment.loss(ids[:, 16:]).total
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=0)


def test_a_teacher_of_low_precision_serves_a_student_of_float32() -> None:
    student, teacher = pair("llama", NARROW)
    student.float()
    teacher.bfloat16()
    with Alignment(student, teacher) as alignment:
        loss = alignment.loss(some_ids())
    assert loss.total.dtype == torch.float32
    loss.total.backward()


def test_hooks_leave_the_teacher() -> None:
    student, teacher = pair("llama", NARROW)
    with Alignment(student, teacher):
        assert any(module._forward_hooks for module in teacher.modules())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_teacher_that_is_asked_for_its_logits_leaves_nothing_behind() -> None:
    student, teacher = pair("llama", NARROW)
    ids = some_ids()
    with Alignment(student, teacher) as alignment, torch.no_grad():
        before = alignment.loss(ids).total
        with AliveBytes() as alive:
            teacher(ids)
        assert alive.now == 0
        assert alignment.loss(ids).total == before


def test_another_model_is_no_teacher() -> None:
    student, _ = pair("llama", NARROW)
    other = make_model(hf_config("llama", hidden_size=64))
    with pytest.raises(
        ValueError, match=r"^the student has hidden_size 32, but its teacher has 64$"
    ):
        Alignment(student, other)


def test_layers_with_windows_only_are_aligned_too() -> None:
    student, teacher = pair(
        "llama", NARROW, ("window_attention", "full_attention", "eva_attention")
    )
    assert aligned_layers(student, teacher) == (0, 2)


def test_alignment_compiles_whole() -> None:
    student, teacher = pair("llama", NARROW, ("eva_attention", "full_attention", "full_attention"))
    with Alignment(student, teacher) as alignment:
        compiled = torch.compile(
            lambda ids: alignment.loss(ids).total, fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(some_ids()), alignment.loss(some_ids()).total)


# Sums of losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ALL)
def test_a_sum_runs_the_teacher_once_and_has_the_numbers_of_two_runs(
    family: str, dtype: torch.dtype
) -> None:
    """The last layer is exact, so that the teacher has to go on behind what is aligned."""
    first = "sliding_attention" if family == "gemma3_text" else "eva_attention"
    student, teacher = pair(family, NARROW, (first, "eva_attention", "full_attention"))
    teacher.requires_grad_(False)
    if dtype == torch.bfloat16:
        student.float()
        teacher.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    ids = some_ids()
    labels = ids.roll(-1, 1)
    labels[:, -3:] = -100
    start = torch.zeros_like(ids)
    start[:, 16:] = 16
    loss: tuple[tuple[LossName, float], ...] = (("attention_mse", 0.5), *BOTH.items())
    stage = Stage(name="s", loss=loss, train=("*",), steps=1, lr=1.0)
    with Alignment(student, teacher) as alignment, autocast:
        aligned = alignment.loss(ids, start, labels != -100).total
        hidden = student.hidden_states(ids, seq_start=start)
        taught = Teacher(teacher.hidden_states(ids, seq_start=start), teacher.lm_head)
        head = head_losses(hidden, student.lm_head, labels, weights=BOTH, teacher=taught)
        wanted = 0.5 * aligned + head.objective.total
    wanted.backward()
    gradients = [p.grad for p in student.parameters()]
    student.zero_grad()
    calls: list[int] = []
    for layer, block in enumerate(teacher.layers):
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    objective = Objective(student, teacher, stage)
    with autocast:
        total, losses = objective(ids, labels, start)
    total.backward()
    objective.close()
    assert calls == [0, 1, 2]
    assert torch.equal(total, wanted)
    assert losses["attention_mse"] == aligned
    for name in BOTH:
        assert losses[name] == head.losses[name].total
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]


def test_a_sum_compiles_whole() -> None:
    student, teacher = pair("llama", NARROW)
    loss: tuple[tuple[LossName, float], ...] = (("attention_mse", 0.5), *BOTH.items())
    stage = Stage(name="s", loss=loss, train=("*",), steps=1, lr=1.0)
    objective = Objective(student, teacher.requires_grad_(False), stage)
    ids = some_ids()
    batch = ids, ids.roll(-1, 1), torch.zeros_like(ids)
    wanted, _ = objective(*batch)
    objective.compile(fullgraph=True, backend="eager")
    found, _ = objective(*batch)
    objective.close()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("losses", [("attention_mse",), ("logit_kl",), ("attention_mse", *BOTH)])
def test_parts_are_compiled_once_for_all_layers(
    losses: tuple[LossName, ...], recompute: bool
) -> None:
    """Gradients stay, and the number of graphs does not grow with that of layers."""
    batch = some_ids(), some_ids().roll(-1, 1), torch.zeros_like(some_ids())
    counts = []
    for layers in (5, 12):  # graphs of one function may be 8
        types = ["eva_attention", "full_attention", *["eva_attention"] * (layers - 2)]
        fields = {"num_hidden_layers": layers, "eva": SHORT_WINDOW.to_dict()}
        student = make_model(
            hf_config("llama", layer_types=types, **fields), seed=1, dtype=torch.float64
        )
        teacher = make_model(
            hf_config("llama", layer_types=["full_attention"] * layers, **fields),
            dtype=torch.float64,
        )
        if recompute:
            recompute_blocks(student)
        weights = tuple((name, 0.5) for name in losses)
        stage = Stage(name="s", loss=weights, train=("*",), steps=1, lr=1.0)
        gradients = []
        for compiled in (False, True):
            objective = Objective(student, teacher.requires_grad_(False), stage)
            counter = CompileCounter()
            if compiled:
                objective.compile_parts(counter)
            student.zero_grad()
            objective(*batch)[0].backward()
            objective.close()
            gradients.append({n: p.grad for n, p in student.named_parameters()})
        torch.testing.assert_close(gradients[1], gradients[0])
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0
