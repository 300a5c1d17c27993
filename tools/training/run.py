"""Run: a recipe's stages one after the other, in a folder from which the same command goes on.

    run.json              what decides about numbers; versions, device (run_file.py)
    metrics.jsonl         a line a step (metrics.py)
    tensorboard/STAGE/    if asked for
    checkpoints/STAGE/    of the stage that is running (checkpoints.py)
    bad-batch/            the batch of a step that was not taken (guard.py)
    STAGE/                what a finished stage made: a model folder that zoo.load takes
    STAGE-adapter/        the same over its base, where no matrix but EVA's and LoRA's changed

A stage begins with the folder of the one before, also where both run in one go: so a run that was
killed between them has the same numbers.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

import zoo
from flasheva import Impl
from recipes import Stage
from tools.training.checkpoints import Checkpoints
from tools.training.checks import CheckOptions, Checks
from tools.training.data.batches import Batches, BatchesState
from tools.training.data.shards import Shards, open_shards
from tools.training.data.tokenizers import fingerprint
from tools.training.lora import lora_factors, merge_lora
from tools.training.metrics import Metrics
from tools.training.models import Conversion, give_tokenizer
from tools.training.parameters import is_adapter, prepare
from tools.training.preflight import ADAPTER, check_stages
from tools.training.ranks import Ranks, whole_state
from tools.training.run_file import begin
from tools.training.trainer import Hooks, Loop, train_stage
from zoo import CausalLM, Tokenizer
from zoo.adapters import changed_matrices

METRICS_FILE = "metrics.jsonl"
_PREFETCH = 2

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run is made of, besides its recipe.

    Attributes:
        tokens: folder of `zoo tokenize`.
        out: folder of the run; made, or gone on with.
        shares: of rows, for each source; None: all documents once in a pass.
        impl: how EVA layers compute.
        tokenizer: for a model that has none.
        loop: how stages run.
        checks: what is measured meanwhile.
        tensorboard: whether events are written.
    """

    tokens: Path
    out: Path
    shares: Mapping[str, float] | None = None
    impl: Impl = "auto"
    tokenizer: Tokenizer | None = None
    loop: Loop
    checks: CheckOptions | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class Screen:
    """What people see.

    Attributes:
        bar: a progress bar of so many steps, as `tools.display.progress`.
        say: shows a line.
        command: the command line, for run.json.
    """

    bar: Bar
    say: Callable[[str], None]
    command: str


def deal(
    shards: Shards,
    conversion: Conversion,
    stage: Stage,
    index: int,
    shares: Mapping[str, float] | None,
    ranks: Ranks,
    *,
    prefetch: int = 0,
) -> Batches:
    """The batches of stage number `index`; shares as `RunOptions`.

    Raises:
        ValueError: sizes or shares that do not fit.
    """
    try:
        return Batches(
            shards,
            row_size=stage.context,
            chunk_size=conversion.eva.chunk_size,
            batch_size=stage.batch_size,
            seed=stage.seed + index,  # stages of one seed read other rows
            weights=shares,
            rank=ranks.rank,
            ranks=ranks.count,
            prefetch=prefetch,
        )
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from None


def run_stages(conversion: Conversion, options: RunOptions, ranks: Ranks, screen: Screen) -> Path:
    """Runs all stages that are not done; returns the folder of the last one.

    Raises:
        ValueError: one line: a folder of another run, tokens of another tokenizer, settings that
            do not fit, or a run that diverged.
    """
    stages = conversion.recipe.stages
    check_stages(
        conversion.config(),
        stages,
        weights=conversion.weights,
        rows=options.loop.rows,
        ranks=ranks.count,
    )
    shards = open_shards(options.tokens)
    deals = [
        deal(shards, conversion, stage, index, options.shares, ranks, prefetch=_PREFETCH)
        for index, stage in enumerate(stages)
    ]
    with ExitStack() as stack:
        for batches in deals:
            stack.callback(batches.close)
        ranks.first_does(
            lambda: begin(stack, options.out, conversion, deals, screen.command, ranks)
        )
        before: Path | None = None
        for stage, batches in zip(stages, deals, strict=True):
            folder = options.out / stage.name
            if not folder.is_dir():
                _run_stage(conversion, stage, before, batches, shards, options, ranks, screen)
            _checkpoints(options.out, stage, ranks).remove()  # a kill may have left some
            before = folder
        assert before is not None
        return before


def _run_stage(
    conversion: Conversion,
    stage: Stage,
    before: Path | None,
    batches: Batches,
    shards: Shards,
    options: RunOptions,
    ranks: Ranks,
    screen: Screen,
) -> None:
    out = options.out
    student = conversion.student(stage, before, ranks.device, options.impl)
    tokenizer = _tokenizer(student, options.tokenizer, shards)
    checks = None
    if options.checks is not None:
        if tokenizer is None:
            raise ValueError("checks need a tokenizer, which the model does not have")
        checks = Checks(options.checks, tokenizer, student.config.max_position_embeddings)
    teacher = conversion.teacher(stage, ranks.device, options.impl)
    checkpoints = _checkpoints(out, stage, ranks)
    first = checkpoints.newest() or 0
    batches.load_state_dict(BatchesState(step=first, plan=batches.state_dict()["plan"]))
    metrics = None
    if ranks.first:
        events = out / "tensorboard" / stage.name if options.tensorboard else None
        metrics = Metrics(out / METRICS_FILE, stage.name, first, events)
        screen.say(f"stage {stage.name}: {stage.num_steps:,} steps, from step {first:,}")
    shown = screen.bar(stage.name, stage.num_steps) if ranks.first else nullcontext(_nothing)
    try:
        with shown as advance:
            train_stage(
                *(student, teacher, stage, batches, ranks, options.loop),
                Hooks(metrics, checks, advance, screen.say),
                checkpoints,
                out / "bad-batch" / f"{stage.name}.safetensors",
            )
    finally:
        if metrics is not None:
            metrics.close()
    del teacher
    _export(conversion, stage, before, student, out / stage.name, options, ranks)


def _checkpoints(out: Path, stage: Stage, ranks: Ranks) -> Checkpoints:
    return Checkpoints(out / "checkpoints" / stage.name, ranks)


def _export(
    conversion: Conversion,
    stage: Stage,
    before: Path | None,
    student: CausalLM,
    folder: Path,
    options: RunOptions,
    ranks: Ranks,
) -> None:
    """Writes the model of a finished stage, whole; all processes take part."""
    state = whole_state(student) if ranks.count > 1 else None

    def write() -> None:
        model = student
        if state is not None:
            model = conversion.student(stage, before, torch.device("cpu"), options.impl)
            prepare(model, stage)  # the same adapters
            model.load_state_dict(state, strict=False)
            model.tokenizer = student.tokenizer
        try:
            if conversion.weights == "auto" and not _trained_matrices(model):
                _export_adapter(conversion, model, folder.with_name(f"{folder.name}{ADAPTER}"))
            merge_lora(model)
            zoo.save(model, folder)
        except SafetensorError as error:  # of a disk that is full, among others
            raise ValueError(f"cannot write {folder}: {error}") from None

    ranks.first_does(write)


def _trained_matrices(student: CausalLM) -> list[str]:
    """Those that an adapter would have to approximate: all but EVA's and LoRA's."""
    return [
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
        and parameter.ndim > 1
        and ".attend." not in name
        and not is_adapter(name)
    ]


def _export_adapter(conversion: Conversion, student: CausalLM, folder: Path) -> None:
    """Writes what differs from the base, unless a stage before has changed matrices."""
    base = zoo.load(conversion.base, device="cpu", dtype=torch.float32, weights="published")
    student_on_cpu = student.cpu()
    if not changed_matrices(student_on_cpu, base):
        zoo.save_adapter(
            student_on_cpu,
            folder,
            base=base,
            base_name=conversion.base,
            factors=lora_factors(student_on_cpu),
        )


def _tokenizer(model: CausalLM, given: Tokenizer | None, shards: Shards) -> Tokenizer | None:
    """The model's, which the tokens must be of; gives it `given` if it has none."""
    entry = shards.manifest["tokenizer"]
    have = model.tokenizer
    if have is not None and given is not None and fingerprint(have) != fingerprint(given):
        raise ValueError("--tokenizer is for random weights; this model has another one")
    if model.tokenizer is None and given is not None:
        give_tokenizer(model, given)
    if model.tokenizer is None:
        if entry["vocab_size"] > model.config.vocab_size:
            raise ValueError(
                f"the tokens are of a vocabulary of {entry['vocab_size']}, the model has "
                f"{model.config.vocab_size}"
            )
        return None
    if fingerprint(model.tokenizer) != entry["fingerprint"]:
        raise ValueError(
            "the tokens were made with another tokenizer than the model's; run zoo tokenize "
            "with --tokenizer and this model's name"
        )
    return model.tokenizer


def _nothing(steps: int) -> None:
    del steps
