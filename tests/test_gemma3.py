"""Gemma 3: the numbers of transformers, the window it is published with, names and placements."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import zoo
from flasheva import EvaConfig
from flasheva.triton import ops
from layers import Context, ModelCache, build_attention
from recipes import Placement, exact_layers, layer_types, parse_recipe, sliding_layers
from recipes.placement import LayerSet
from tests.tiny import make_model, scramble
from tools.placement.branches import Branches
from tools.placement.sweep import sweep
from zoo.export import export_model
from zoo.families import read_config

SLIDING, FULL, EVA = "sliding_attention", "full_attention", "eva_attention"
WINDOW, VOCAB = 16, 300
LENGTHS = (1, 17, 100)  # up to six windows
SHORT = EvaConfig(window_size=16, chunk_size=4)


def fields(**changes: object) -> dict[str, object]:
    """A config.json; 7 layers, of which 5 is full and the others slide."""
    return {
        "model_type": "gemma3_text",
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 256,
        "sliding_window": WINDOW,
    } | changes


CASES = {
    "as-270m": fields(),
    "two-key-heads": fields(num_key_value_heads=2, sliding_window=5),
    "thetas": fields(rope_theta=300.0, rope_local_base_freq=20.0),
    "eps-untied": fields(rms_norm_eps=1e-2, tie_word_embeddings=False),
    "silu-other-pattern": fields(hidden_activation="silu", sliding_window_pattern=2),
    "all-full": fields(layer_types=[FULL] * 7),
    "all-sliding": fields(layer_types=[SLIDING] * 7),
}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def random_ids(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


@torch.no_grad()
def centred(model: nn.Module) -> nn.Module:
    """`scramble` makes weights of norms that lie about 1: here they are added to 1."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.sub_(1)
    return model


def ours_of(config: dict[str, object], dtype: torch.dtype = torch.float32) -> zoo.CausalLM:
    model = make_model(config, dtype=dtype)
    centred(model)
    return model


def of_transformers(config: dict[str, object]) -> Gemma3ForCausalLM:
    theirs = Gemma3ForCausalLM(Gemma3TextConfig(**config)).eval()
    scramble(theirs)
    centred(theirs)
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = of_transformers(CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = zoo.load(tmp_path)
    assert ours.config == read_config(CASES[case])  # also from the file that transformers writes
    for length in LENGTHS:
        wanted = theirs(random_ids(length)).logits
        assert wanted.std() > 1
        torch.testing.assert_close(ours(random_ids(length)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_in_float64_they_are_equal_to_what_transformers_keeps_in_float32(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = of_transformers(CASES[case]).double()
    theirs.save_pretrained(tmp_path)
    ours = zoo.load(tmp_path, dtype="float64")
    # Its norms say .float(). Frequencies and the scale of embeddings are float32 buffers: 6e-8.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for length in LENGTHS:
        wanted = theirs(random_ids(length)).logits
        torch.testing.assert_close(ours(random_ids(length)), wanted, atol=1e-5, rtol=0)


def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    ends = {"eos_token_id": None, "bos_token_id": None}
    theirs = of_transformers(fields(tie_word_embeddings=False, **ends))
    theirs.save_pretrained(tmp_path)
    prompts = random_ids(21)
    wanted = theirs.generate(prompts, max_new_tokens=40, do_sample=False, pad_token_id=0)[:, 21:]
    assert len(wanted.unique()) > 5
    written = zoo.generate(zoo.load(tmp_path), prompts.tolist(), max_new_tokens=40)
    assert [row.ids for row in written] == wanted.tolist()


def tiny(*types: str, **changes: object) -> zoo.CausalLM:
    """Ours in float64, with these types of layers."""
    config = fields(layer_types=types, num_hidden_layers=len(types), eva=SHORT.to_dict())
    return ours_of(config | changes, torch.float64)


MIXES = {
    "published": (SLIDING, FULL, SLIDING),
    "eva": (SLIDING, EVA, SLIDING, FULL),
    "window": ("window_attention", SLIDING),
}


@pytest.mark.parametrize("mix", MIXES)
def test_any_pieces_onto_a_cache_equal_one_pass(mix: str) -> None:
    model, ids = tiny(*MIXES[mix]), random_ids(90)
    whole = model(ids)
    for sizes in ([90], [37, 1, 1, 1, 50], [1] * 90, [15, 16, 17, 42]):
        cache = model.new_cache(2, 96)
        pieces = [model(piece, cache) for piece in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("mix", MIXES)
def test_rows_of_other_lengths_packed_rows_and_rollback_change_nothing(mix: str) -> None:
    model, ids = tiny(*MIXES[mix]), random_ids(80)
    alone = model(ids)
    # Two rows of different lengths, padded on the right, then one step each.
    lengths, cache = torch.tensor([70, 33]), model.new_cache(2, 96, max_rollback=5)
    padded = torch.where(torch.arange(70) < lengths[:, None], ids[:, :70], 7)
    model(padded, cache, lengths=lengths)
    step = ids.gather(1, lengths[:, None])
    for _ in range(2):
        got = model(step, cache)[:, 0]
        wanted = alone[torch.arange(2), lengths]
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)
        model(random_ids(4), cache)
        cache.rollback(5)  # the step too, which is then taken again
    # The same two rows as two documents of one row.
    packed = torch.cat([ids[:1, :40], ids[1:]], 1)
    start = torch.tensor([[0] * 40 + [40] * 80])
    got = model(packed, seq_start=start)
    torch.testing.assert_close(got[:, 40:], alone[1:], atol=1e-9, rtol=0)


def test_a_sliding_layer_sees_the_last_tokens_of_its_window_and_no_other() -> None:
    model, ids = tiny(SLIDING), random_ids(60, batch=1)
    before = model(ids)[0, -1]
    for distance in range(60):
        other = ids.clone()
        other[0, -1 - distance] = (other[0, -1 - distance] + 1) % VOCAB
        changed = not torch.equal(model(other)[0, -1], before)
        assert changed == (distance < WINDOW)


def test_the_cache_of_a_sliding_layer_does_not_grow() -> None:
    model = tiny(SLIDING)
    short, long = (model.new_cache(1, length).nbytes for length in (100, 10_000))
    assert short == long == 2 * (WINDOW + 1) * 16 * 8


@pytest.mark.parametrize("head_dim", [16, pytest.param(256, marks=pytest.mark.slow)])
def test_our_kernels_compute_a_sliding_layer(head_dim: int) -> None:
    """In Triton's interpreter, or on a GPU: whole rows, packed ones, pieces and steps."""
    device = "cpu" if ops.INTERPRETED else "cuda"
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": head_dim}
    layers = [
        build_attention(SLIDING, **sizes, eva=SHORT, sliding_window=WINDOW, impl=impl)
        for impl in ("reference", "triton")
    ]
    q = torch.randn(2, 4, 70, head_dim, device=device)
    k, v = torch.randn(2, 2, 1, 70, head_dim, device=device)
    ids = torch.zeros(2, 70, dtype=torch.int64, device=device)
    start = torch.tensor([[0] * 33 + [33] * 37, [0] * 70], device=device)
    for seq_start in (None, start):
        context = Context.of(ids, None, seq_start, None)
        wanted, got = (layer(q, k, v, context, None) for layer in layers)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    outs = []
    for layer in layers:
        cache = ModelCache.build(
            [layer],
            batch_size=2,
            max_seq_len=80,
            max_rollback=0,
            dtype=q.dtype,
            cache_dtype=None,
            device=q.device,
        )
        pieces = []
        for piece in torch.arange(70, device=device).split([30, 1, 1, 20, 18]):
            context = Context.of(ids[:, piece], cache, None, None)
            parts = (x[:, :, piece] for x in (q, k, v))
            pieces.append(layer(*parts, context, context.of_layer(0).layer_cache))
            context.finish()
        outs.append(torch.cat(pieces, 2))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=0)
    context = Context.of(ids, None, None, None)
    torch.testing.assert_close(outs[0], layers[0](q, k, v, context, None), atol=1e-5, rtol=0)


def check_compiled(model: zoo.CausalLM, backend: str) -> None:
    torch._dynamo.reset()
    compiled, ids = torch.compile(model, fullgraph=True, backend=backend), random_ids(50)
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-9, rtol=0)
    cache = model.new_cache(2, 64)
    pieces = [compiled(piece, cache) for piece in ids.split([40, 1, 1, 8], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-9, rtol=0)
    torch._dynamo.reset()


@pytest.mark.slow
def test_it_is_traced_without_a_graph_break() -> None:
    check_compiled(tiny(SLIDING, FULL), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_inductor_gives_the_same_numbers(mix: str) -> None:
    check_compiled(tiny(*MIXES[mix]), "inductor")


def test_in_bfloat16_it_errs_as_transformers_does(tmp_path: Path) -> None:
    theirs = of_transformers(CASES["as-270m"])
    theirs.save_pretrained(tmp_path)
    ids = random_ids(80)
    wanted = theirs(ids).logits
    narrow = zoo.load(tmp_path, dtype="bfloat16")(ids), theirs.bfloat16()(ids).logits
    assert narrow[0].dtype == torch.bfloat16
    ours, of_theirs = ((logits - wanted).abs().mean() for logits in narrow)
    assert 0 < ours < 1.2 * of_theirs


def test_an_adapter_keeps_sliding_layers_and_the_second_rope(tmp_path: Path) -> None:
    zoo.save(ours_of(fields()), tmp_path / "base")
    base = zoo.load(tmp_path / "base")
    types = [SLIDING] * 5 + [EVA, SLIDING]
    model = zoo.load(tmp_path / "base", layer_types=types, eva=SHORT)
    model.get_parameter("layers.5.attention.attend.k_map.weight").add_(0.1)
    model.get_parameter("layers.2.attention.q_norm.weight").add_(0.1)
    name = str(tmp_path / "base")
    zoo.save_adapter(model, tmp_path / "adapter", base=base, base_name=name)
    again = zoo.load(tmp_path / "adapter")
    assert again.config == model.config
    assert torch.equal(again(random_ids(100)), model(random_ids(100)))
    assert not torch.equal(again(random_ids(100)), base(random_ids(100)))


def test_a_saved_model_is_read_back_by_both_sides(tmp_path: Path) -> None:
    ours, ids = ours_of(CASES["thetas"]), random_ids(60)
    zoo.save(ours, tmp_path / "saved")
    export_model(ours, tmp_path / "exported", tokenizer=False)
    for name in ("saved", "exported"):
        again = zoo.load(tmp_path / name)
        assert again.config == ours.config
        assert torch.equal(again(ids), ours(ids))
        theirs, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)


def test_a_converted_model_is_saved_but_not_exported(tmp_path: Path) -> None:
    ours = ours_of(fields(eva=SHORT.to_dict(), layer_types=[SLIDING, EVA], num_hidden_layers=2))
    zoo.save(ours, tmp_path / "saved")
    again = zoo.load(tmp_path / "saved")
    assert (again.config, again.config.eva) == (ours.config, SHORT)
    assert torch.equal(again(random_ids(40)), ours(random_ids(40)))
    with pytest.raises(ValueError, match=r"cannot export a converted gemma3_text.*unmodified"):
        export_model(ours, tmp_path / "exported", tokenizer=False)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_pre_attn_scalar": 168}, "'query_pre_attn_scalar' must be head_dim=16, not 168"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' must be null"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' must be null"),
        ({"attention_bias": True}, "'attention_bias' must be false"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention' must be false"),
        ({"sliding_window": None}, "'sliding_window' is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "not 'linear'"),
        ({"layer_types": ["global"] * 7}, "layer_types[0] must be one of"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"config field|rope type|layer_types") as caught:
        read_config(fields(**change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_families_have_no_sliding_layers() -> None:
    config = fields(model_type="llama", layer_types=[SLIDING] * 7)
    with pytest.raises(ValueError, match=r"layer_types\[0\] must be one of full.*not 'sliding"):
        read_config(config)


# Names, recipes and placements


def test_eva_takes_the_place_of_full_layers_only() -> None:
    published = zoo.describe("gemma3-270m").layer_types
    assert published == tuple(FULL if i in (5, 11, 17) else SLIDING for i in range(18))
    for name, exact in (("-eva", ()), ("-eva-hybrid", (5, 11))):
        types = zoo.describe(f"gemma3-270m{name}").layer_types
        assert types == tuple(
            FULL if i in exact else EVA if published[i] == FULL else SLIDING for i in range(18)
        )


def test_a_rule_counts_only_layers_that_may_be_exact() -> None:
    slides = sliding_layers(zoo.describe("gemma3-270m").layer_types)
    found = {
        rule: [exact_layers(Placement(rule=rule, count=n), 18, slides) for n in (1, 2, 3)]
        for rule in ("uniform", "first", "last")
    }
    assert found == {
        "uniform": [(11,), (5, 17), (5, 11, 17)],
        "first": [(5,), (5, 11), (5, 11, 17)],
        "last": [(17,), (11, 17), (5, 11, 17)],
    }
    drawn = {
        exact_layers(Placement(rule="random", count=1, seed=s), 18, slides) for s in range(20)
    }
    assert drawn == {(5,), (11,), (17,)}
    with pytest.raises(ValueError, match=r"4 exact .* 3 layers that do not slide; .* 1 to 3"):
        exact_layers(Placement(rule="first", count=4), 18, slides)


def recipe(path: Path, layers: str) -> Path:
    path.write_text(f'base = "gemma3-270m"\n[layers]\n{layers}\n')
    return path


@pytest.mark.parametrize("exact", [(), (5,), (5, 17), (5, 11, 17)], ids=str)
def test_a_recipe_has_a_budget_of_0_to_3(exact: tuple[int, ...], tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.toml", f"exact = {list(exact)}\nattention = 'window_attention'")
    types = zoo.describe(path).layer_types
    assert [i for i, kind in enumerate(types) if kind == FULL] == list(exact)
    assert types.count("window_attention") == 3 - len(exact)
    assert types.count(SLIDING) == 15


def test_a_layer_that_slides_is_neither_exact_nor_converted(tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.toml", "exact = [3, 5, 6]")
    with pytest.raises(
        ValueError,
        match=r"recipe 'r': layer 3, 6 has sliding-window attention .*; exact may be 5, 11, 17$",
    ):
        zoo.describe(path)
    published = zoo.describe("gemma3-270m").layer_types
    for layer, kind in ((3, FULL), (0, EVA), (5, SLIDING)):
        types = [kind if i == layer else k for i, k in enumerate(published)]
        with pytest.raises(ValueError, match=rf"layer_types\[{layer}\] must be .*, as published"):
            zoo.describe("gemma3-270m", layer_types=types)


def test_a_recipe_without_sliding_layers_is_what_it_was() -> None:
    found = parse_recipe('base = "x"\n[layers]\nexact = [1]', name="x").layer_types(3)
    assert found == layer_types((1,), 3, EVA) == (EVA, FULL, EVA)


def test_a_search_places_the_layers_that_do_not_slide() -> None:
    types = layer_types((), 7, EVA, {0, 2, 3, 4, 6})
    branches = Branches(ours_of(fields(layer_types=types, eva=SHORT.to_dict())))
    assert branches.layers == (1, 5)
    placements: list[LayerSet] = [(), (1,), (5,), (1, 5)]
    ids = random_ids(40)
    for index, found in sweep(branches, ids, placements, rows=4):
        exact = layer_types(placements[index], 7, EVA, {0, 2, 3, 4, 6})
        alone = ours_of(fields(layer_types=exact, eva=SHORT.to_dict()))
        alone.load_state_dict(branches.model.state_dict(), strict=False)
        expected = alone.hidden_states(ids)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
