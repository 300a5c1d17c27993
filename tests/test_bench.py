"""`zoo bench kernels`: what is right is timed, what is wrong or missing is listed."""

import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flasheva import EvaConfig
from flasheva.config import Window
from flasheva.visibility import Positions, visible
from tests.command_line import ROOT, Run, assert_mistake, python, run
from tests.test_cli import options_of
from tools.benchmarks import correctness, kernels, timing
from tools.benchmarks.batch import largest_batch
from tools.benchmarks.implementations import IMPLEMENTATIONS, Call, Implementation
from tools.benchmarks.inputs import Inputs, Shape, make_inputs
from tools.benchmarks.kernels import Outcome, Plan
from tools.benchmarks.plot import points
from tools.benchmarks.report import print_outcomes
from tools.benchmarks.roofline import Ceilings, Work, causal_config, least_work, roofline
from tools.benchmarks.roofline import visible_pairs as count_pairs
from tools.benchmarks.timing import Timing, measure_replay
from zoo import graph_capture

SHAPE = "1,2,70,32"  # 70 is no multiple of the chunk size
REFERENCE = IMPLEMENTATIONS["reference"]


def bench(*arguments: object) -> Run:
    sizes = ("--window-size", 16, "--chunk-size", 4, "--repetitions", 2)
    given = (*sizes, "--device", "cpu", "--dtype", "float32", *arguments)
    shape = () if "--shape" in arguments else ("--shape", SHAPE)
    return run("bench", "kernels", *shape, *given)


def only(*impls: str) -> list[str]:
    return [word for impl in impls for word in ("--impl", impl)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def times(path: Path) -> list[tuple[str, str | None, int | None, str]]:
    return [
        (row["impl"], row["case"]["window"], row["case"]["S"], row["case"]["pass"])
        for row in read(path)
        if row["metric"] == "time"
    ]


# What runs


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flex_with_a_prebuilt_mask_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes a minute
    out = tmp_path / "rows.jsonl"
    options = ("--window", "sliding", "--pass", "forward", "--out", out)
    for bias in ("--no-bias", "--bias"):
        assert bench(*only("flex_prebuilt"), bias, *options).code == 0
    assert times(out) == [("flex_prebuilt", "sliding", 4, "forward")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["--no-bias", "--bias"])
@pytest.mark.parametrize("impl", ["flex_prebuilt", "flex"])
def test_compiled_kernels_are_checked_timed_and_recorded(
    impl: str, bias: str, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    done = bench(*only(impl, "reference"), bias, "--window", "sliding", "--json", "--out", out)
    assert (done.code, done.err) == (0, "")
    ceiling, *lines = (json.loads(line) for line in done.out.splitlines())
    assert ceiling.keys() == {"dtype", "impl", "copy_bandwidth", "matrix_rate"}
    assert [(line["impl"], line["pass"], line["status"]) for line in lines] == [
        (impl, "forward", "timed"),
        (impl, "forward_backward", "failed"),  # FlexAttention has no backward on a CPU
        ("reference", "forward", "timed"),
        ("reference", "forward_backward", "timed"),
    ]
    assert all(("time" in line) == (line["status"] == "timed") for line in lines)
    assert all(bool(line["note"]) == (line["status"] == "failed") for line in lines)
    assert times(out) == [
        (line["impl"], "sliding", 4, line["pass"]) for line in lines if "time" in line
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a run over two shapes."""
    out = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    shapes = ("--shape", "2,4,70,16", "--shape", "1,4,33,16")
    done = bench(*only("reference", "sdpa_flash"), *shapes, "--kv-heads", 2, "--out", out)
    assert done.code == 0, done
    return out


def test_a_row_says_what_was_measured(recorded: Path) -> None:
    rows = read(recorded)
    assert {row["bench"] for row in rows} == {"kernels"}
    assert [row["metric"] for row in rows if row["impl"] == "ceiling"] == [
        "copy_bandwidth",
        "matrix_rate",
    ]
    ceilings = {row["metric"]: row["value"] for row in rows[:2]}
    passes = ("forward", "forward_backward")
    windows = [("reference", window, 4) for window in ("sliding", "block")]
    jobs = [*windows, ("sdpa_flash", None, None)]
    assert times(recorded) == [(*job, name) for job in jobs for name in passes] * 2
    for row in rows[2:]:
        case = row["case"]
        assert (case["H"], case["G"], case["D"], case["dtype"]) == (4, 2, 16, "float32")
        assert case["shape"] == f"{case['B']},4,{case['T']},16"
        assert (case["bias"], case["cuda_graph"]) == (False, False)
        assert row["value"] > 0
        assert row["command"].startswith("zoo bench kernels --window-size 16 ")
    # The derived numbers follow from the time.
    first = {row["metric"]: row["value"] for row in rows[2:] if row["case"] == rows[2]["case"]}
    seconds = first["time"] / 1e3
    pairs = 2 * 4 * count_pairs(EvaConfig(window_size=16, chunk_size=4), 70)
    assert first["flops"] == pytest.approx(4 * 16 * pairs / seconds / 1e12)
    assert first["bandwidth"] == pytest.approx(2 * (4 + 2 + 2 + 4) * 70 * 16 * 4 / seconds / 1e12)
    assert first["roofline"] == pytest.approx(
        max(
            first["flops"] / ceilings["matrix_rate"],
            first["bandwidth"] / ceilings["copy_bandwidth"],
        )
    )


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_rows_from_a_checkout_name_its_commit(recorded: Path) -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    commits = {row["commit"] for row in read(recorded)}
    # "-dirty" while somebody works on it.
    assert [head.startswith(commit.removesuffix("-dirty")) for commit in commits] == [True]


def test_half_precision_answers_are_accepted(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for bias in ("--no-bias", "--bias"):
        impls = only("reference", "sdpa_flash")
        options = ("--window", "block", "--dtype", "bfloat16", "--out", out)
        assert bench(*impls, bias, *options).code == 0
    with_bias = [
        (row["impl"], row["case"]["bias"]) for row in read(out) if row["metric"] == "time"
    ]
    peer = [("sdpa_flash", False)] * 2  # knows none
    assert with_bias == [
        *([("reference", False)] * 2 + peer),
        *([("reference", True)] * 2 + peer),
    ]


def test_times_are_compared_with_ours_and_sinks_have_a_price(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", REFERENCE)
    done = bench(*only("triton", "reference", "sdpa_flash"), "--pass", "forward")
    header, *rows = (line.split() for line in done.out.splitlines()[4:])
    assert " ".join(header).endswith("with exp / sliding / block")
    assert [row[:3] for row in rows[1:-1]] == [
        [impl, window, sinks]
        for window in ("sliding", "block")
        for impl, sinks in (("triton", "4"), ("reference", "4"), ("triton", "0"))
    ]
    assert (rows[1][-1], rows[4][-1]) == ("1.00", "1.00")
    assert rows[-1][0] == "sdpa_flash"
    assert all(float(ratio) > 0 for ratio in rows[-1][-2:])


# What does not run


def test_what_is_missing_or_fails_is_listed_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: EvaConfig, x: Inputs) -> Call:
        raise RuntimeError("no kernel\nfor this GPU")

    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(IMPLEMENTATIONS, "sdpa_cudnn", Implementation("causal", fail))
    out = tmp_path / "rows.jsonl"
    impls = only("sdpa_cudnn", "fla_chunk_gla", "fla_gated_delta_rule", "reference")
    done = bench(*impls, "--pass", "forward", "--window", "block", "--out", out)
    assert done.code == 0
    assert "failed: RuntimeError: no kernel for this GPU" in done.out
    assert done.out.count("not installed: ") == 2
    assert times(out) == [("reference", "block", 4, "forward")]


def test_our_own_kernels_may_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: EvaConfig, x: Inputs) -> Call:
        raise RuntimeError("out of resources")

    monkeypatch.setitem(IMPLEMENTATIONS, "triton", Implementation("eva", fail))
    done = bench(*only("triton", "reference"), "--pass", "forward", "--window", "block")
    assert done.code == 1
    assert "failed: RuntimeError: out of resources" in done.out


def test_a_run_that_could_measure_nothing_has_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    assert bench(*only("fla_chunk_gla")).code == 1


# What is wrong


def changed(change: Callable[[Tensor, Inputs], Tensor]) -> Implementation:
    """The reference with a change of its output."""

    def prepare(config: EvaConfig, x: Inputs) -> Call:
        call = REFERENCE.prepare(config, x)
        return Call(lambda: change(call.run(), x), call.differentiable)

    return Implementation("eva", prepare)


def without_last_row(out: Tensor, x: Inputs) -> Tensor:
    return torch.cat([out[:, :, :-1], torch.zeros_like(out[:, :, -1:])], 2)


def with_nan(out: Tensor, x: Inputs) -> Tensor:
    return out.masked_fill(torch.arange(out.shape[3]) == 5, float("nan"))


def with_more_of_the_gradient(out: Tensor, x: Inputs) -> Tensor:
    return out + 0.01 * (out - out.detach())


def with_some_gradient_of_a_map(out: Tensor, x: Inputs) -> Tensor:
    weight = x.maps.q.weight.sum()
    return out + (weight - weight.detach())


BOTH = {"forward", "forward_backward"}
WRONG: dict[str, tuple[Callable[[Tensor, Inputs], Tensor], str, set[str]]] = {
    "scaled": (lambda out, x: 1.001 * out, "output", BOTH),
    "one_row": (without_last_row, "output", BOTH),
    "nan": (with_nan, "not finite", BOTH),
    "dtype": (lambda out, x: out.double(), "torch.float64", {"forward"}),
    "gradients": (with_more_of_the_gradient, "gradient of q", {"forward_backward"}),
    "map": (with_some_gradient_of_a_map, "gradient of q_map.weight", {"forward_backward"}),
}


@pytest.mark.parametrize(("change", "what", "passes"), WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_not_timed(
    change: Callable[[Tensor, Inputs], Tensor],
    what: str,
    passes: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", changed(change))
    out = tmp_path / "rows.jsonl"
    words = [word for name in passes for word in ("--pass", name)]
    arguments = ("--sink-size", 4, "--window", "sliding", "--out", out)
    done = bench(*only("triton", "reference"), *words, *arguments)
    assert done.code == 1
    found = [line for line in done.out.splitlines() if "WRONG" in line]
    assert len(found) == len(passes)
    assert all(what in line for line in found)
    assert times(out) == [("reference", "sliding", 4, name) for name in sorted(passes)]


def inputs(shape: Shape, bias: bool) -> Inputs:
    return make_inputs(shape, 4, torch.float32, torch.device("cpu"), bias=bias)


@pytest.mark.parametrize("bias", [None, "detached"])
def test_a_bias_without_gradient_or_effect_is_wrong(bias: str | None) -> None:
    def prepare(config: EvaConfig, x: Inputs) -> Call:
        assert x.bias is not None
        inner = dataclasses.replace(x, bias=None if bias is None else x.bias.detach())
        return Call(REFERENCE.prepare(config, inner).run, x.differentiable())

    config = EvaConfig(window_size=16, chunk_size=4)
    x = inputs(Shape(2, 4, 2, 70, 32), bias=True)
    wrong = correctness.check_gradients(prepare, config, x)
    assert wrong is not None
    assert ("output" if bias is None else "gradient of bias") in wrong
    with torch.no_grad():
        rows = correctness.check_rows(config, x, prepare(config, x).run())
    assert (rows is None) == (bias is not None)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_and_rows_of_the_reference_are_right(bias: bool) -> None:
    config = EvaConfig(window_size=16, chunk_size=4)
    x = inputs(Shape(2, 4, 2, 70, 32), bias)
    assert ("bias" in x.differentiable()) == bias
    assert correctness.check_gradients(REFERENCE.prepare, config, x) is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_wrong_rule_is_found_by_the_sample_of_rows(bias: bool) -> None:
    config = EvaConfig(window_size=16, chunk_size=4)
    x = inputs(Shape(3, 4, 2, 70, 32), bias)
    for other in (config, EvaConfig(window_size=16, chunk_size=4, sink_size=0)):
        with torch.no_grad():
            wrong = correctness.check_rows(config, x, REFERENCE.prepare(other, x).run())
        assert (wrong is None) == (other is config)


def test_full_size_gradients_are_finite_and_near_those_of_the_rival() -> None:
    rival = {"q": torch.randn(9), "bias": torch.zeros(2)}
    near = {"q": 1.01 * rival["q"], "bias": torch.zeros(2)}
    assert correctness.check_against_rival(near, rival) is None
    far = near | {"q": 1.03 * rival["q"]}
    assert "gradient of q" in (correctness.check_against_rival(far, rival) or "")
    assert correctness.check_against_rival(far, None) is None
    infinite = near | {"bias": torch.tensor([0.0, torch.inf])}
    assert "bias" in (correctness.check_against_rival(infinite, None) or "")


# The least work


CONFIGS = [
    EvaConfig(window=window, window_size=W, chunk_size=P, sink_size=S)
    for window, (W, P), S in itertools.product(
        get_args(Window), ((16, 4), (16, 16), (5, 1)), (0, 16, 48)
    )
]


@pytest.mark.parametrize("T", [1, 3, 16, 70, 129])
def test_pairs_are_counted_as_the_rule_shows_them(T: int) -> None:
    for config in (*CONFIGS, causal_config(T)):
        mask = visible(config, Positions(), T, T, T // config.chunk_size, torch.device("cpu"))
        assert count_pairs(config, T) == int(mask.sum()), config


def test_the_rows_of_the_issue_are_bound_by_memory_and_by_arithmetic() -> None:
    """The pilot's floors: 0.07 ms of memory traffic for short rows, 0.58 TFLOP for long ones."""
    config, ceilings = EvaConfig(window="block"), Ceilings(3.0e12, 760e12, None)
    short = least_work(Shape(16, 12, 12, 2048, 64), config, torch.bfloat16, "forward")
    assert roofline(short, 0.07, ceilings).fraction == pytest.approx(1, abs=0.05)
    long = least_work(Shape(1, 16, 16, 65536, 64), config, torch.bfloat16, "forward")
    assert long.flops == pytest.approx(0.58e12, rel=0.02)


def test_exponentials_add_to_arithmetic_only() -> None:
    work = Work(bytes=3, flops=2, exponentials=4)
    assert roofline(work, 10e3, Ceilings(1, 1, 2)) == (0.3, 0.4)
    assert roofline(work, 10e3, Ceilings(0.5, 1, 2)) == (0.6, 0.6)


# CUDA graphs, without a GPU


class FakeStream:
    def __init__(self, cuda: "FakeCuda", name: str) -> None:
        self.cuda, self.name, self.device_index = cuda, name, 0

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.log.append("event")

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 10.0


class FakeGraph:
    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda, self.kernels = cuda, list[Callable[[], object]]()

    def replay(self) -> None:
        self.cuda.log.append("replay")
        for kernel in self.kernels:
            kernel()

    def reset(self) -> None:
        self.cuda.log.append("reset")


class FakeFlush:
    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda = cuda

    def zero_(self) -> None:
        self.cuda.log.append("flush")


class FakeCuda:
    """As much of torch.cuda as timing uses; `log` is what happened, in order.

    `ends`: whether the allocator learns of the end of a failed capture, unlike in torch 2.11.
    """

    POOL = (0, 7)

    def __init__(self, ends: bool) -> None:
        self.log: list[str] = []
        self.main = self.current = FakeStream(self, "main")
        self.capturing: FakeGraph | None = None
        self.ends, self.allocator_captures = ends, False

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(
        self, graph: FakeGraph, *, pool: tuple[int, int], stream: FakeStream
    ) -> Iterator[None]:
        assert pool == self.POOL
        before, self.current = self.current, stream
        self.capturing, self.allocator_captures = graph, True
        try:
            yield
        except Exception:
            self.allocator_captures = not self.ends
            raise RuntimeError("operation failed due to a previous error") from None
        finally:
            self.capturing = None
        self.current, self.allocator_captures = before, False

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        assert (device, pool) == (0, self.POOL)
        if not self.allocator_captures:
            raise RuntimeError("not currently recording to mempool_id")
        self.allocator_captures = False

    def empty_cache(self) -> None:
        assert not self.allocator_captures
        self.log.append("empty_cache")

    def square(self, x: Tensor) -> Tensor:
        """A kernel: at once, or at every replay of the graph that is captured."""
        self.log.append(f"{'captured' if self.capturing else 'run'} on {self.current.name}")
        if self.capturing is None:
            return x * x
        y = torch.zeros_like(x)
        self.capturing.kernels.append(lambda: y.copy_(x * x))
        return y


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda(ends=getattr(request, "param", True))
    replaced: dict[str, Callable[..., object]] = {
        "CUDAGraph": lambda: FakeGraph(fake),
        "Event": lambda enable_timing: FakeEvent(fake),
        "Stream": lambda device: FakeStream(fake, "side"),
        "current_stream": lambda device: fake.current,
        "graph_pool_handle": lambda: fake.POOL,
        "synchronize": lambda device=None: None,
    }
    for name in ("stream", "graph", "set_stream", "empty_cache"):
        replaced[name] = getattr(fake, name)
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate)
    monkeypatch.setattr(timing, "_cache_filler", lambda: FakeFlush(fake))
    monkeypatch.setattr(gc, "collect", lambda: fake.log.append("gc"))
    graph_capture.capture_stream.cache_clear()
    yield fake
    graph_capture.capture_stream.cache_clear()


GPU = torch.device("cuda")


def test_a_call_is_warmed_up_captured_checked_and_replayed(cuda: FakeCuda) -> None:
    x = torch.arange(3.0)
    found = measure_replay(lambda: {"y": cuda.square(x)}, GPU, 2)
    assert (found.median, found.spread, found.repetitions) == (10, 0, 2)
    assert (found.cuda_graph, found.not_captured) == (True, None)
    assert found.host is not None
    log = cuda.log[5:]  # behind the host's time
    assert log[:8] == [
        *("run on main", "side waits for main"),
        *(["run on side"] * 3 + ["main waits for side", "gc"]),
        "captured on side",
    ]
    timed = ["flush", "event", "replay", "event"]
    assert log[8:] == ["replay", *timed * 4, *["replay"] * 5, *timed * 2, "reset", "empty_cache"]


@pytest.mark.parametrize("cuda", [True, False], indirect=True, ids=["later_torch", "torch_2.11"])
def test_what_cannot_be_captured_is_timed_by_eager_calls(cuda: FakeCuda) -> None:
    def call() -> dict[str, Tensor]:
        if cuda.capturing:
            raise RuntimeError("synchronised")
        return {"y": cuda.square(torch.ones(3))}

    found = measure_replay(call, GPU, 2)
    assert (found.cuda_graph, found.not_captured) == (False, "RuntimeError: synchronised")
    assert found.host is not None
    assert cuda.current is cuda.main
    assert not cuda.allocator_captures
    assert "replay" not in cuda.log
    assert "reset" in cuda.log
    timed = ["flush", "event", "run on main", "event"]
    assert cuda.log[-13:] == [*timed * 2, *["run on main"] * 5]
    # The next one is captured; that its numbers are all zero is right.
    assert measure_replay(lambda: {"y": cuda.square(torch.zeros(3))}, GPU, 2).cuda_graph


@pytest.mark.parametrize("lost", ["everything", "input"])
def test_a_replay_that_gives_other_numbers_is_not_timed(cuda: FakeCuda, lost: str) -> None:
    def call() -> dict[str, Tensor]:
        y = cuda.square(torch.full((3,), 1.1 if lost == "input" and cuda.capturing else 1.0))
        if lost == "everything" and cuda.capturing:
            cuda.capturing.kernels.clear()
        return {"y": y}

    found = measure_replay(call, GPU, 2)
    assert not found.cuda_graph
    assert found.not_captured == "a replay gives another y than an eager call"


def test_rows_and_tables_say_what_was_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = iter([Timing(1, 0.1, 2, 0.5, cuda_graph=True), Timing(2, 0, 2, 0.5, False, "a\nb")])
    monkeypatch.setattr("tools.bench._graphs", lambda asked, device: True)
    monkeypatch.setattr(kernels, "measure_replay", lambda run, device, repetitions: next(timings))
    out = tmp_path / "rows.jsonl"
    options = ("--window", "block", "--pass", "forward", "--out", out)
    done = bench(*only("reference", "sdpa_flash"), *options)
    assert done.code == 0
    lines = done.out.splitlines()
    assert "replayed CUDA graphs" in done.out
    assert [line.split()[:2] for line in lines[-3:-1]] == [
        ["reference", "block"],
        ["sdpa_flash", "*"],
    ]
    assert lines[-1] == "sdpa_flash: * eager calls, no CUDA graph: a b"
    cases = {row["impl"]: row["case"] for row in read(out) if row["metric"] == "time"}
    assert cases["reference"]["cuda_graph"] is True
    assert "not_captured" not in cases["reference"]
    assert cases["sdpa_flash"]["cuda_graph"] is False
    assert cases["sdpa_flash"]["not_captured"] == "a b"


def test_a_table_fits_in_128_columns(capsys: pytest.CaptureFixture[str]) -> None:
    windows = get_args(Window)
    plan = Plan(
        windows=windows,
        window_size=256,
        chunk_size=16,
        sink_sizes=None,
        bias=True,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        impls=("triton", "fla_gated_delta_rule"),
        passes=("forward",),
        repetitions=None,
        cuda_graph=True,
    )
    shape, slow = Shape(1, 16, 16, 65536, 64), Timing(1234.567, 12.345, 10, 123.456)
    ours = [
        Outcome(
            shape=shape,
            impl="triton",
            config=EvaConfig(window=window),
            pass_="forward",
            status="timed",
            timing=slow,
            work=Work(1, 10**15, 1),
        )
        for window in windows
    ]
    peer = dataclasses.replace(ours[0], impl="fla_gated_delta_rule", config=None, reason="r" * 50)
    failed = dataclasses.replace(peer, timing=None, status="failed", reason="s" * 200)
    print_outcomes([*ours, peer, failed], plan, Ceilings(1e12, 1e15, 1e13))
    rule, *table = capsys.readouterr().out.splitlines()
    assert "bias" in rule
    assert max(map(len, table[:-2])) <= 128
    assert table[-1] == "fla_gated_delta_rule: failed: " + "s" * 200


# The picture


def test_times_are_drawn(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    during, after = tmp_path / "during.png", tmp_path / "after.png"
    options = ("--window", "block", "--pass", "forward", "--plot", during)
    assert bench(*only("reference"), *options).code == 0
    assert run("bench", "plot", recorded, after) == (0, "", "")
    for picture in (during, after):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"during.png", "after.png"}


def test_lines_tell_apart_bias_and_eager_calls(recorded: Path) -> None:
    row = next(row for row in read(recorded) if row["metric"] == "time")
    rows = [
        row | {"case": row["case"] | {"bias": bias, "cuda_graph": graph}}
        for bias in (False, True)
        for graph in (False, True)
    ]
    label = "reference sliding 16/4 G = H / 2"
    assert {point.label for point in points(rows)} == {
        f"{label} float32 eager",
        f"{label} float32",
        f"{label} bias float32 eager",
        f"{label} bias float32",
    }
    assert [point.label for point in points(rows[:1])] == [f"{label} float32"]


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_mistake(bench("--plot", tmp_path / "a.png"), "pip install 'flasheva-zoo[plot]'")


# The command


MISTAKES = {
    "shape": ("--shape 1,2,64", "four positive numbers B,H,T,D"),
    "zero": ("--shape 1,0,64,32", "four positive numbers B,H,T,D"),
    "kv_heads": ("--kv-heads 3", "must divide 2, not be 3"),
    "window": ("--window round", "--window must be one of sliding, block"),
    "impl": ("--impl cuda", "--impl must be one of triton, flex"),
    "pass": ("--pass backward", "--pass must be one of forward, forward_backward"),
    "chunk": ("--chunk-size 5", "chunk_size must divide window_size"),
    "sinks": ("--sink-size 3", "sink_size"),
    "repetitions": ("--repetitions 1", "repetitions must be at least 2"),
    "device": ("--device tpu", "cuda or cpu, not 'tpu'"),
    "cuda_graph": ("--cuda-graph", "--cuda-graph needs a GPU, which --device cpu is not"),
    "no_such_gpu": ("--device cuda:99", "sees no GPU 'cuda:99'"),
    "out": ("--out nowhere/rows.jsonl", "nowhere"),
    "plot": ("--plot picture.jpg", ".png"),
}


@pytest.mark.parametrize(("line", "what"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(line: str, what: str) -> None:
    assert_mistake(bench(*line.split()), what)


@pytest.mark.parametrize(
    ("content", "what"),
    [("", "one device; here: none"), ("[1]\n", "line 1 of"), ("{\n", "line 1 of")],
    ids=["empty", "no_row", "no_json"],
)
def test_a_file_without_times_cannot_be_drawn(content: str, what: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    assert_mistake(run("bench", "plot", tmp_path / "rows.jsonl", tmp_path / "a.png"), what)


@pytest.mark.parametrize("command", ["kernels", "plot", "tiles", "stability"])
def test_the_module_has_the_options_of_the_command(command: str) -> None:
    alone = python("-m", "tools.bench", command, "--help")
    inside = run("bench", command, "--help")
    assert alone.code == inside.code == 0
    assert options_of(alone.out) == options_of(inside.out)


def row_of(impl: str, value: float, **case: object) -> dict[str, object]:
    """A row of a time."""
    given = {"shape": "1,2,64,16", "pass": "forward", "window": "block", "S": 16} | case
    return {
        **{"bench": "kernels", "case": given, "impl": impl, "metric": "time", "value": value},
        **{"unit": "ms", "spread": 0.0, "device": "cpu"},
    }


def test_a_table_compares_with_others_and_with_no_sinks(tmp_path: Path) -> None:
    rows = [
        row_of("triton", 9.0),
        row_of("triton", 2.0),  # of two, the last
        row_of("triton", 1.6, S=0),
        row_of("flex", 5.0),
        row_of("sdpa_cudnn", 3.0, window=None, S=None),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("bench", "table", file)
    assert done.code == 0, done
    *_, line = done.out.splitlines()
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:7] == ["1, 2, 64, 16", "forward", "block", "2.000", "2.50 x", "1.50 x", "25.0 %"]
    with file.open("a") as more:
        more.write(json.dumps(row_of("triton", 5.0, dtype="float32")) + "\n")
    assert_mistake(run("bench", "table", file), "rows of a table share device, dtype")
    file.write_text(json.dumps(row_of("flex", 5.0)) + "\n")
    assert_mistake(run("bench", "table", file), "a table needs times of triton")


def test_a_table_of_decoding_says_how_much_faster_ours_is(tmp_path: Path) -> None:
    job = {"model": "pythia-70m", "batch": 2, "prompt": 9, "new": 4, "dtype": "bfloat16"}
    eva: dict[str, object] = {"W": 256, "P": 16, "layers": "none"}

    def row(impl: str, metric: str, value: float, on: str, more: dict[str, object]) -> str:
        case = {**job, **more}
        found = {"bench": "decode", "case": case, "impl": impl, "metric": metric, "value": value}
        return json.dumps({**found, "device": on}) + "\n"

    file = tmp_path / "rows.jsonl"
    ours = [row("zoo_eva", "throughput", x, "a GPU", eva) for x in (9, 1200.0)]  # of two, the last
    static = row("transformers_static", "throughput", 300.0, "a GPU", {"prefill_chunk": 64})
    file.write_text("".join([*ours, row("zoo_eva", "roofline", 0.5, "a GPU", eva), static]))
    done = run("bench", "table", file)
    assert done.code == 0, done
    *_, first, second = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines()
    ]
    assert first[:5] == ["pythia-70m", "2", "9 + 4", "zoo_eva, W 256, P 16", "1,200"]
    assert first[-2:] == ["50%", ""]
    assert [second[3], second[-1]] == ["transformers_static, prefill_chunk 64", "4.00 x"]
    other = tmp_path / "other.jsonl"
    other.write_text(row("zoo_eva", "throughput", 5.0, "a GPU", {**eva, "dtype": "float32"}))
    with other.open("a") as more:
        more.write(row("zoo_eva", "throughput", 2.0, "a GPU", {**eva, "compile": False}))
        more.write(row("zoo_full", "cache", 2.0, "a GPU", {}))
    names = [line.split("|")[1:5:3] for line in run("bench", "table", other).out.splitlines()[2:]]
    assert [[x.strip() for x in line] for line in names] == [
        ["pythia-70m, float32", "zoo_eva, W 256, P 16"],
        ["pythia-70m", "zoo_eva, W 256, P 16, compile False"],
        ["pythia-70m", "zoo_full"],
    ]
    other.write_text(static + json.dumps(row_of("triton", 1.0)) + "\n")
    assert_mistake(run("bench", "table", other), "here: decode and kernels")
    other.write_text(json.dumps({"bench": "decode", "case": {}, "metric": "x", "device": "y"}))
    assert_mistake(run("bench", "table", other), "a row of decoding has impl and model")
    if importlib.util.find_spec("matplotlib"):
        picture = tmp_path / "a.png"
        assert run("bench", "plot", file, picture) == (0, "", "")
        assert picture.read_bytes().startswith(b"\x89PNG")
    with file.open("a") as more:
        more.write(row("zoo_full", "throughput", 1.0, "another", {}))
    assert_mistake(run("bench", "table", file), "rows of decoding must share the device")


# Batches


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 40, 97, 5000])
@pytest.mark.parametrize(("guess", "step"), [(1, 2.0), (16, 2.0), (97, 1.05), (6000, 1.05)])
def test_the_largest_batch_is_found(limit: int, guess: int, step: float) -> None:
    tried: list[int] = []

    def fits(rows: int) -> bool:
        assert rows not in tried
        tried.append(rows)
        return rows <= limit

    low, high = largest_batch(fits, guess, step)
    assert low <= limit < high
    assert high - low <= max(1, 0.03 * low)


def test_a_batch_is_tried_on_a_gpu_only() -> None:
    assert_mistake(run("bench", "batch", "--device", "cpu"), "use --device cuda")
    assert_mistake(run("bench", "batch", "--device", "cpu", "--memory", 0), "GiB above 0")


@pytest.mark.parametrize("command", ["batch", "decode"])
def test_what_belongs_to_another_engine_is_refused(command: str) -> None:
    words = ("bench", command, "--device", "cpu", "--impl")
    assert_mistake(run(*words, "full", "--layers", "2"), "--layers is of the engine eva")
    assert_mistake(run(*words, "eva", "--prefill-chunk", 64), "is of transformers' engines")


@pytest.mark.gpu
def test_a_batch_is_tried_on_a_gpu() -> None:
    command = ("bench", "batch", "--model", "pythia-70m", "--context", 2048, "--memory", 2)
    done = run(*command, "--impl", "eva", "--impl", "transformers_default", "--json")
    assert done.code == 0, done
    ours, theirs = map(json.loads, done.out.splitlines())
    assert abs(ours["max_batch"] / ours["largest_batch"] - 1) <= 0.1
    assert ours["largest_batch"] > 2 * theirs["largest_batch"] > 0


# Decoding

SMALL_DECODE = (
    *("--model", "pythia-70m", "--batch-size", 2, "--prompt", 40, "--new", 5),
    *("--window-size", 32, "--no-compile"),
)


@pytest.mark.slow
def test_decoding_is_checked_timed_and_recorded(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    where = ("--device", "cpu", "--dtype", "float32", "--out", out)
    done = run("bench", "decode", *SMALL_DECODE, *where, "--layers", "1-2")
    assert done.code == 0, done
    rows = read(out)
    assert {row["impl"] for row in rows} == {
        *("zoo_eva", "zoo_full", "transformers_static", "transformers_default")
    }
    for row in rows:
        assert (row["bench"], row["case"]["batch"]) == ("decode", 2)
        assert row["value"] > 0, row
    found = {(row["impl"], row["metric"]): row["value"] for row in rows}
    assert found["zoo_eva", "cache"] < found["zoo_full", "cache"] * 2
    assert 0 < found["zoo_eva", "roofline"] < 1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("--model pythia-160", "--model must be one of tiny, pythia-70m"),
        ("--new 2", "--new must be at least 4, not 2"),
        ("--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--device cuda:99", "sees no GPU 'cuda:99'"),
        ("--impl vllm", "--impl must be one of eva, full, transformers_static"),
    ],
)
def test_a_mistake_of_decode_is_one_line(line: str, what: str) -> None:
    assert_mistake(run("bench", "decode", *line.split()), what)


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu_decoding_is_captured(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run("bench", "decode", *SMALL_DECODE, *only("eva", "full"), "--out", out)
    assert done.code == 0, done
    assert {row["metric"] for row in read(out)} >= {
        "capture_time",
        "peak_memory_decode",
        "roofline",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["--no-bias", "--bias"])
@pytest.mark.parametrize("graph", ["--cuda-graph", "--no-cuda-graph"])
def test_on_a_gpu_everything_is_right_and_has_a_roofline(
    bias: str, graph: str, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    impls = only("flex_prebuilt", "flex", "triton", "reference", "sdpa_cudnn", "sdpa_flash")
    options = ("--shape", "2,4,1000,64", "--window", "sliding", "--sink-size", 16)
    done = run(
        *("bench", "kernels", *impls, *options, bias, graph, "--repetitions", 10, "--out", out)
    )
    assert done.code == 0, done
    assert len(times(out)) == 12, done.out
    captured = {row["case"]["cuda_graph"] for row in read(out) if row["metric"] == "time"}
    assert captured == {graph == "--cuda-graph"}, done.out
    found = {row["metric"] for row in read(out)}
    assert {"exponential_rate", "host_time", "peak_memory", "roofline_with_exponentials"} <= found
    for row in read(out):
        assert not row["metric"].startswith("roofline") or 0 < row["value"] < 1, row


@pytest.mark.gpu
def test_on_a_gpu_a_capture_that_fails_does_no_harm() -> None:
    device = torch.device("cuda")
    x = torch.arange(1.0, 1e6, device=device)

    def synchronises() -> dict[str, Tensor]:
        return {"y": x * x.sum().item()}

    def right() -> dict[str, Tensor]:
        return {"y": x * x.sum()}

    before = torch.cuda.current_stream()
    for _ in range(2):
        failed = measure_replay(synchronises, device, 3)
        assert not failed.cuda_graph
        assert "captur" in (failed.not_captured or "")
        assert torch.cuda.current_stream() == before
        timing.free_memory(device)
        assert measure_replay(right, device, 3).not_captured is None
        torch.randn(9, device=device)


DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def test_where_no_kernel_runs_no_tile_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run("bench", "tiles", "--kernel", "keys", "--shape", "1,1,40,16", "--device", "cpu")
    assert_mistake(done, "impl='triton' runs on cuda, not cpu")


def test_tiles_are_tried_one_by_one_and_compared(tmp_path: Path) -> None:
    sizes = f"--shape 1,1,80,16 --window-size 32 --dtype float32 --device {DEVICE}"
    out = tmp_path / "tiles.jsonl"
    done = run(
        *("bench", "tiles", "--kernel", "keys", "--tile", "32,64,4,1", *sizes.split()),
        *("--repetitions", "2"),
        *("--out", str(out)),
    )
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"]["tile"][:2] for row in rows] == [[32, 32], [32, 64]]
    assert all(row["bench"] == "tiles" and row["value"] > 0 for row in rows)


@pytest.mark.parametrize("tile", ["64,64,4", "64,64,4,0", "a,b,c,d", "1,2,3,4,5,6"])
def test_a_tile_that_is_none_is_refused_in_one_line(tile: str) -> None:
    sizes = ("--shape", "1,1,40,16", "--dtype", "float32", "--device", DEVICE)
    done = run("bench", "tiles", "--kernel", "keys", "--tile", tile, *sizes)
    assert_mistake(done, "a tile of keys is written such as 64,32,4,3")
