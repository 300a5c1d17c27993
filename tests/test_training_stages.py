"""Stages of a recipe: their schema, what trains and how fast, adapters, and the plan of it all."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import recipes
from flasheva import EvaConfig
from recipes import Layers, Lora, LossName, Recipe, Stage, parse_recipe, recipe_text, write_recipe
from tests.tiny import FAMILIES, config, hf_config, make_model, mixed
from tools.training.lora import LoraLinear, add_lora, merge_lora
from tools.training.losses import Teacher, head_losses
from tools.training.parameters import (
    autocast,
    build_optimizer,
    optimizer_groups,
    prepare,
    set_learning_rates,
    trained_names,
)
from tools.training.plan import make_plan, plan_text
from tools.training.schedule import rate_factor
from zoo import CausalLM
from zoo.alive_bytes import AliveBytes
from zoo.families import build, preset, read_config

GOOD = """
base = "smollm2-135m"
[layers]
exact = [7]
[[stages]]
name = "align"
loss = "attention_mse"
train = ["*.attention.*"]
steps = 20
lr = 3e-4
[[stages]]
name = "distill"
loss = { logit_kl = 1.0, cross_entropy = 0.1 }
train = ["*norm*"]
tokens = 100_000
lr = 1
lr_groups = { "*.input_layernorm.*" = 6e-4, "*" = 2e-5 }
warmup = 3
schedule = "constant"
lr_floor = 0.1
betas = [0.8, 0]
weight_decay = 0.01
clip = 0.5
dtype = "float32"
batch_size = 8
context = 512
seed = 3
temperature = 2.0
lora = { rank = 4, alpha = 8, targets = ["*.q_proj"] }
"""
DISTILL = Stage(
    name="distill",
    loss=(("logit_kl", 1.0), ("cross_entropy", 0.1)),
    train=("*norm*",),
    tokens=100_000,
    lr=1.0,
    lr_groups=(("*.input_layernorm.*", 6e-4), ("*", 2e-5)),
    warmup=3,
    schedule="constant",
    lr_floor=0.1,
    betas=(0.8, 0.0),
    weight_decay=0.01,
    clip=0.5,
    dtype="float32",
    batch_size=8,
    context=512,
    seed=3,
    temperature=2.0,
    lora=Lora(rank=4, alpha=8.0, targets=("*.q_proj",)),
)
LORA = Lora(rank=2, alpha=3.0, targets=("*.q_proj", "*.down_proj"))


def stage(**fields: object) -> Stage:
    """A short stage."""
    some = {"name": "s", "loss": (("cross_entropy", 1.0),), "train": ("*",), "lr": 1e-2}
    some |= {"steps": 10, "batch_size": 2, "context": 16, "dtype": "float32"}
    return Stage(**(some | fields))  # type: ignore[arg-type]


def tiny(family: str = "llama", **fields: object) -> CausalLM:
    return make_model(mixed(family) | fields)


# The schema


def test_every_field_is_read_and_the_others_have_defaults() -> None:
    align, distill = parse_recipe(GOOD, name="x").stages
    assert distill == DISTILL
    assert align == Stage(
        name="align", loss=(("attention_mse", 1.0),), train=("*.attention.*",), steps=20, lr=3e-4
    )
    assert parse_recipe('base = "b"\n[layers]\nexact = []', name="x").stages == ()
    assert align.needs_teacher
    assert not stage().needs_teacher


def test_written_stages_are_read_back(tmp_path: Path) -> None:
    recipe = parse_recipe(GOOD, name="mine")
    odd = stage(name="odd", lr_groups=(('*."quoted" \\ü.*', 1e-20),), clip=0.0, steps=1)
    recipe = Recipe(
        name="mine", base="b", eva={}, layers=Layers(exact=()), stages=(*recipe.stages, odd)
    )
    assert parse_recipe(recipe_text(recipe), name="mine") == recipe
    write_recipe(recipe, tmp_path / "mine.toml")
    assert recipes.read_recipe(tmp_path / "mine.toml") == recipe


def test_a_budget_of_tokens_is_never_exceeded() -> None:
    assert DISTILL.tokens_per_step == 4096
    assert DISTILL.num_steps == 24
    assert 24 * 4096 <= 100_000 < 25 * 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 20", "stps = 20"), "unknown key 'stps' in [stages[0]]; did you mean 'steps'?"),
        (("rank = 4", "rnk = 4"), "unknown key 'rnk' in [stages[1].lora]; did you mean 'rank'?"),
        (('name = "align"\n', ""), "missing key 'stages[0].name', a string"),
        (("lr = 3e-4\n", ""), "missing key 'stages[0].lr', a number"),
        (('train = ["*.attention.*"]\n', ""), "missing key 'stages[0].train', an array of str"),
        (("lr = 3e-4", 'lr = "x"'), "stages[0].lr must be a number, not 'x'"),
        (("steps = 20", "steps = true"), "stages[0].steps must be an integer, not True"),
        (('["*.attention.*"]', "[3]"), "stages[0].train must be an array of strings, not [3]"),
        (("[0.8, 0]", '["x"]'), "stages[1].betas must be an array of numbers, not ['x']"),
        (("= 0.1 }", '= "x" }'), "stages[1].loss.'cross_entropy' must be a number, not 'x'"),
        (('"attention_mse"', "7"), "stages[0].loss must be the name of a loss or a table of wei"),
        (
            ('"attention_mse"', '"atention_mse"'),
            "stage 'align': there is no loss 'atention_mse'; did you mean 'attention_mse'?",
        ),
        (
            ('"attention_mse"', "{}"),
            "stage 'align': loss must not be empty; known: attention_mse, logit_kl, cross_entropy",
        ),
        (("= 0.1 }", "= 0.0 }"), "stage 'distill': loss.cross_entropy must be a positive number"),
        (('["*.attention.*"]', "[]"), "stage 'align': train must not be empty; [\"*\"] trains ev"),
        (("steps = 20\n", ""), "stage 'align': give steps or tokens, not neither"),
        (
            ("steps = 20", "steps = 20\ntokens = 100000"),
            "stage 'align': give steps or tokens, not",
        ),
        (("steps = 20", "steps = 0"), "stage 'align': steps must be at least 1, not 0"),
        (
            ("= 100_000", "= 4095"),
            "stage 'distill': tokens must be at least one step of 4096, not",
        ),
        (("lr = 3e-4", "lr = 0"), "stage 'align': lr must be a positive number, not 0.0"),
        (("lr = 3e-4", "lr = nan"), "stage 'align': lr must be a positive number, not nan"),
        (("= 2e-5", "= -1"), "stage 'distill': lr_groups.'*' must be a positive number, not -1.0"),
        (("warmup = 3", "warmup = 25"), "stage 'distill': warmup must be between 0 and 24 steps"),
        (
            ('"constant"', '"consine"'),
            "stage 'distill': there is no schedule 'consine'; did you mean 'cosine'?",
        ),
        (('"float32"', '"float16"'), "stage 'distill': there is no dtype 'float16'; did you mean"),
        (("lr_floor = 0.1", "lr_floor = 2"), "stage 'distill': lr_floor must be between 0 and 1"),
        (("[0.8, 0]", "[0.8]"), "stage 'distill': betas must be two numbers from 0 to below 1, n"),
        (("[0.8, 0]", "[0.8, 1]"), "stage 'distill': betas must be two numbers from 0 to below 1"),
        (
            ("seed = 3", "seed = 4294967296"),
            "stage 'distill': seed must be between 0 and 4294967295",
        ),
        (("clip = 0.5", "clip = -1"), "stage 'distill': clip must not be negative, but is -1.0"),
        (("= 2.0", "= 0"), "stage 'distill': temperature must be a positive number, not 0.0"),
        (("rank = 4", "rank = 0"), "lora.rank must be at least 1, not 0"),
        (("alpha = 8", "alpha = 0"), "lora.alpha must be a positive number, not 0.0"),
        (('["*.q_proj"]', "[]"), "lora.targets must not be empty"),
        (('"align"', '"a/b"'), "the name of a stage must be letters, digits, '-' and '_', not 'a"),
        (('"align"', '"distill"'), "2 stages have the name 'distill'"),
    ],
)
def test_a_mistake_in_a_stage_is_one_line(change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ValueError, match=r"^recipe 'x': [^\n]+$") as caught:
        parse_recipe(GOOD.replace(*change, 1), name="x")
    assert str(caught.value).removeprefix("recipe 'x': ").startswith(message)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct-distill", "smollm2-135m-instruct-paper"])
def test_shipped_stages_fit_the_model(name: str) -> None:
    recipe = recipes.find_recipe(name)
    assert recipe is not None
    with torch.device("meta"):
        values = preset("llama", "smollm2-135m")
        eva = EvaConfig.from_dict(recipe.eva).to_dict()
        types = list(recipe.layer_types(30))
        model = build(read_config(values | {"layer_types": types, "eva": eva}), "auto")
    for each in recipe.stages:
        assert trained_names(model, each)


def test_the_schedule_of_the_paper_ships() -> None:
    recipe = recipes.find_recipe("smollm2-135m-instruct-paper")
    assert recipe is not None
    assert EvaConfig.from_dict(recipe.eva) == EvaConfig.paper()
    first, second = recipe.stages
    assert (first.steps, first.dtype, first.train) == (2000, "float32", ("*.attention.*",))
    assert (second.dtype, second.train) == ("bfloat16", ("*",))
    assert first.loss == second.loss == (("cross_entropy", 1.0),)


# The schedule


def test_warm_up_and_cosine() -> None:
    ours = stage(steps=12, warmup=4, lr_floor=0.2)
    rates = [rate_factor(ours, step) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(before > after for before, after in pairwise(rates[3:]))
    assert rates[3 + 3] == pytest.approx(0.2 + 0.8 * (1 + 0.5) / 2)  # a third of the way
    assert 0.2 < rates[-1] < 0.25
    assert rate_factor(stage(steps=1), 0) == 1.0
    constant = stage(steps=5, warmup=2, schedule="constant")
    assert [rate_factor(constant, step) for step in range(5)] == [0.5, 1, 1, 1, 1]
    assert rate_factor(stage(steps=3, warmup=3), 2) == 1.0
    with pytest.raises(ValueError, match=r"^stage 's' has steps 0 to 4, not 5$"):
        rate_factor(constant, 5)


# What trains


def test_patterns_choose_parameters() -> None:
    model = tiny()
    chosen = prepare(model, stage(train=("layers.0.attention.attend.*", "norm.*")))
    expected = {name for name in dict(model.named_parameters()) if ".0.attention.attend." in name}
    assert chosen.keys() == expected | {"norm.weight"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == chosen.keys()
    for name, pattern in (("train", "*.atention.*"), ("lr_groups", "layers.1.*")):
        wrong = {"train": ("norm.*", pattern)} if name == "train" else {"train": ("norm.*",)}
        groups = ((pattern, 1.0),) if name == "lr_groups" else ()
        with pytest.raises(ValueError, match=rf"^stage 's': .* in {name} fits no parameter"):
            prepare(model, stage(lr_groups=groups, **wrong))


def test_a_tied_head_is_the_embedding_by_either_name() -> None:
    model = tiny(tie_word_embeddings=True)
    for pattern in ("lm_head.*", "embed_tokens.*"):
        assert trained_names(model, stage(train=(pattern,))) == ["embed_tokens.weight"]


def test_groups_have_their_rates_and_only_matrices_decay() -> None:
    model = tiny()
    ours = stage(
        weight_decay=0.1, lr_groups=(("*.attend.*", 5e-3), ("*.attention.*", 4e-3)), lr=1e-3
    )
    prepare(model, ours)
    seen = []
    for group in optimizer_groups(model, ours):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)
            maps, attention = ".attend." in name, ".attention." in name
            assert group["lr"] == (5e-3 if maps else 4e-3 if attention else 1e-3)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 and not maps else 0)
            seen.append(name)
    assert sorted(seen) == sorted(dict(model.named_parameters()))


def test_the_optimizer_follows_the_schedule_in_every_group() -> None:
    model = tiny()
    ours = stage(warmup=4, lr_groups=(("*.attention.*", 4e-3),))
    prepare(model, ours)
    optimizer = build_optimizer(model, ours)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2, 4e-3}
    for step, factor in ((1, 0.5), (3, 1.0), (0, 0.25)):
        assert set_learning_rates(optimizer, ours, step) == factor
        assert {group["lr"] for group in optimizer.param_groups} == {1e-2 * factor, 4e-3 * factor}


def train(model: CausalLM, ours: Stage, steps: int) -> list[float]:
    """A few steps on one batch."""
    optimizer = build_optimizer(model, ours)
    ids = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        set_learning_rates(optimizer, ours, step)
        with autocast(ours, torch.device("cpu")):
            hidden = model.hidden_states(ids)
            found = head_losses(hidden, model.lm_head, ids.roll(-1, 1), weights=ours.weights)
        mean = found.objective.mean
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(mean.detach()))
    return losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_lowers_the_loss_and_trains_what_it_names_only(dtype: str) -> None:
    model = tiny().bfloat16()
    ours = stage(train=("*.attention.*",), dtype=dtype)
    prepare(model, ours)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = copy.deepcopy(model.state_dict())
    losses = train(model, ours, 6)
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed
    assert all(".attention." in name for name in changed)


def test_master_weights_take_steps_that_bfloat16_would_round_away() -> None:
    ours = stage(train=("norm.weight",), dtype="bfloat16", lr=1e-5)
    model = tiny()
    prepare(model, ours)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)  # type: ignore[operator]
    train(model, ours, 2)
    weight = model.get_parameter("norm.weight").detach()
    assert (weight != 1).all()
    assert (weight.bfloat16() == 1).all()


# Adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first_and_merge_into_plain_weights(family: str) -> None:
    model = make_model(mixed(family), dtype=torch.float64)
    targets = "*.query_key_value" if family == "gpt_neox" else "*.q_proj"
    ids = torch.randint(100, (2, 30))
    names = set(model.state_dict())
    with torch.no_grad():
        plain = model(ids)
        found = add_lora(model, Lora(rank=2, alpha=3.0, targets=(targets, "*.down_proj")))
        assert len(found) == 6
        assert torch.equal(model(ids), plain)
        assert set(model.state_dict()) == names | {
            f"{n}.{x}" for n in found for x in ("lora_a", "lora_b")
        }
        for name in found:
            model.get_parameter(f"{name}.lora_b").normal_()
        adapted = model(ids)
        assert (adapted - plain).abs().max() > 0.1
        assert merge_lora(model) == found
        torch.testing.assert_close(model(ids), adapted, rtol=1e-10, atol=1e-12)
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_a_merged_weight_is_the_float32_sum_rounded_once() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, dtype=torch.bfloat16)
    adapter = LoraLinear(linear, 2, 3.0)
    with torch.no_grad():
        adapter.lora_a.normal_()
        adapter.lora_b.normal_()
    exact = linear.weight.double() + 1.5 * adapter.lora_b.double() @ adapter.lora_a.double()
    assert torch.equal(adapter.merged().weight, exact.float().bfloat16())
    assert adapter.merged().bias is linear.bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_with_adapters_trains_them_and_no_weight(dtype: str) -> None:
    model = tiny().bfloat16()
    ours = stage(train=("*norm*",), lora=LORA, dtype=dtype)
    chosen = prepare(model, ours)
    assert sum(".lora_" in name for name in chosen) == 12
    assert all(".lora_" in name or "norm" in name for name in chosen)
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # for big models
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in chosen else kept)
    before = copy.deepcopy(model.state_dict())
    losses = train(model, ours, 6)
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == chosen.keys()


def test_adapters_are_the_same_for_one_seed_only() -> None:
    one, same, other = (tiny() for _ in range(3))
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        prepare(model, stage(train=(), lora=LORA, seed=seed))
    name = "layers.0.attention.q_proj.lora_a"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_mistakes_of_adapters() -> None:
    with pytest.raises(
        ValueError, match=r"^lora.targets: '\*.qproj' fits no linear layer; .*q_pro"
    ):
        add_lora(tiny(), Lora(rank=1, alpha=1.0, targets=("*.qproj",)))
    for target in ("*.q_map", "lm_head"):  # whose weights are read, not called
        with pytest.raises(ValueError, match=r"fits no linear layer"):
            add_lora(tiny(), Lora(rank=1, alpha=1.0, targets=(target,)))
    with pytest.raises(ValueError, match=r"^stage 's': 'layers.0.attention.q_proj.weight' has an"):
        prepare(tiny(), stage(train=("*.attention.*",), lora=LORA))
    model = tiny()
    add_lora(model, LORA)
    with pytest.raises(ValueError, match=r"^the model has adapters already"):
        add_lora(model, LORA)


# The plan


def test_a_plan_counts_what_trains() -> None:
    model = tiny()
    ours = stage(train=("*.attention.*",), lr_groups=(("*.attend.*", 1.0),), weight_decay=0.1)
    align = stage(name="align", loss=(("attention_mse", 1.0),), train=("*.attend.*",))
    plan, second = make_plan(config("llama", **_types()), (ours, align), tokens_per_second=32)
    numbers = {n: p.numel() for n, p in model.named_parameters()}
    assert plan.all_numbers == sum(numbers.values())
    assert plan.numbers == sum(size for n, size in numbers.items() if ".attention." in n)
    assert sum(group.numbers for group in plan.trained) == plan.numbers
    groups = {group.name: group for group in plan.trained}
    query = groups["layers.*.attention.q_proj.weight"]
    assert (query.tensors, query.numbers, query.lr, query.weight_decay) == (3, 3072, 1e-2, 0.1)
    bias = groups["layers.*.attention.attend.summary_bias"]
    assert (bias.tensors, bias.numbers, bias.lr, bias.weight_decay) == (1, 4, 1.0, 0)
    assert (plan.steps, plan.tokens, plan.rows, plan.seconds) == (10, 320, 2, 10)
    memory = plan.memory
    assert memory.weights == 4 * plan.all_numbers
    assert memory.gradients == memory.optimizer / 2 == 4 * plan.numbers
    assert memory.teacher == 0
    assert second.memory.teacher == 2 * plan.all_numbers
    assert second.memory.losses == 0 < memory.losses
    assert 0 < second.memory.activations < memory.activations
    text = plan_text((plan, second))
    for line in (
        "stage s: 1 cross_entropy, float32",
        "10 steps of 2 x 16 = 320 tokens",
        f"trains      {plan.numbers:,} of {plan.all_numbers:,} parameters",
        "  time        about 10 s",
        "stage align: 1 attention_mse, float32",
    ):
        assert line in text


def _types() -> dict[str, object]:
    values = mixed("llama")
    return {key: values[key] for key in ("layer_types", "eva")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_keeps(family: str, dtype: str) -> None:
    """Counted as what is alive behind a forward pass; SDPA keeps what our kernels keep."""
    values = hf_config(family, hidden_size=128, intermediate_size=256)
    ours = stage(dtype=dtype, context=128)
    model = make_model(values)
    prepare(model, ours)

    def alive(tokens: int) -> int:
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with AliveBytes() as counted, autocast(ours, torch.device("cpu")):
            hidden = model.hidden_states(ids)
        assert hidden.requires_grad
        return counted.now

    each = (alive(256) - alive(128)) / 128
    (plan,) = make_plan(read_config(values), (ours,))
    assert plan.memory.activations == pytest.approx(each * 2 * 128, rel=0.1)


@pytest.mark.parametrize("loss", ["cross_entropy", "logit_kl"])
@pytest.mark.parametrize("trains", [True, False])
def test_memory_of_the_losses_is_what_they_need(loss: LossName, trains: bool) -> None:
    """The head is as great as the logits here: 64 tokens, 64 wide."""
    values = hf_config("llama", hidden_size=64, vocab_size=4096)
    model, teacher = (make_model(values) for _ in range(2))
    ours = stage(context=32, loss=((loss, 1.0),), train=("*",) if trains else ("*norm*",))
    prepare(model, ours)
    hidden = torch.randn(2, 32, 64, requires_grad=True)
    labels = torch.randint(100, (2, 32))
    with AliveBytes() as alive:
        found = head_losses(
            *(hidden, model.lm_head, labels),
            weights=ours.weights,
            teacher=Teacher(hidden, teacher.lm_head),
        )
        found.objective.mean.backward()
    (plan,) = make_plan(read_config(values), (ours,))
    # Not all that is counted is there at once; pieces of hidden states are not counted.
    assert 0.95 * alive.peak <= plan.memory.losses <= 1.4 * alive.peak


def test_checkpointing_and_fewer_rows_need_less() -> None:
    ours = stage(batch_size=4)
    of = {
        (rows, checkpointing): make_plan(
            config("llama"), (ours,), rows=rows, checkpointing=checkpointing
        )[0].memory.activations
        for rows in (1, 4)
        for checkpointing in (False, True)
    }
    assert of[4, False] == pytest.approx(4 * of[1, False], rel=0.01)
    assert of[1, True] < of[1, False]


def test_a_plan_is_of_one_of_several_processes() -> None:
    ours = stage(batch_size=4)
    half, two_rows, whole = (
        make_plan(config("llama"), (ours,), **options)[0]  # type: ignore[arg-type]
        for options in ({"ranks": 2}, {"rows": 2}, {})
    )
    assert (half.rows, whole.rows) == (2, 4)
    assert half.memory == two_rows.memory
    assert half.tokens == whole.tokens


def test_adapters_are_planned_stage_by_stage() -> None:
    first = stage(name="low", train=(), lora=LORA)
    low, whole = make_plan(config("llama"), (first, stage()))
    assert low.numbers == low.all_numbers - whole.all_numbers
    assert whole.numbers == whole.all_numbers


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"train": ("*.x.*",)}, {}, r"stage 's': '\*\.x\.\*' in train fits no parameter"),
        ({"loss": (("attention_mse", 1.0),)}, {}, "stage 's': 'attention_mse' compares converted"),
        (
            {"context": 18},
            {},
            "stage 's': context must be a multiple of chunk_size=4, not 18: rows are packed",
        ),
        ({}, {"rows": 3}, "stage 's': rows must divide the 2 of a process, not be 3"),
        ({}, {"rows": 2, "ranks": 2}, "stage 's': rows must divide the 1 of a process, not be 2"),
        ({}, {"ranks": 3}, "stage 's': batch_size 2 must be a multiple of the 3 processes"),
        ({}, {"tokens_per_second": 0.0}, r"tokens_per_second must be positive, not 0\.0"),
    ],
)
def test_what_cannot_run_is_not_planned(
    fields: dict[str, object], options: dict[str, int], message: str
) -> None:
    of = config("llama", **(_types() if "context" in fields else {}))
    with pytest.raises(ValueError, match=f"^{message}"):
        make_plan(of, (stage(**fields),), **options)  # type: ignore[arg-type]
