"""Stage: what one stage of fine-tuning trains, with which loss, for how long and how fast.

In a recipe, stages are [[stages]] tables, run in the order in which they stand:

    [[stages]]
    name = "distill"
    loss = "logit_kl"                       # or weights: { logit_kl = 1.0, cross_entropy = 0.1 }
    train = ["*"]                           # names of parameters, as `fnmatch` reads patterns
    tokens = 5_000_000                      # or steps = 150
    lr = 1e-4                               # the highest
    lr_groups = { "*.attention.*" = 6e-4 }  # optional: other rates; the first pattern that fits
    warmup = 10                             # steps; what follows is optional, too
    schedule = "cosine"                     # or "constant"
    lr_floor = 0.0                          # where the cosine ends, as a part of lr
    betas = [0.9, 0.95]
    weight_decay = 0.0                      # of matrices only
    clip = 1.0                              # norm of the gradient; 0 for no clipping
    dtype = "bfloat16"                      # with float32 master weights; or "float32"
    batch_size = 16                         # rows a step, on all GPUs together
    context = 2048                          # tokens a row
    seed = 0
    temperature = 1.0                       # of logit_kl
    lora = { rank = 16, alpha = 32.0, targets = ["*.q_proj", "*.v_proj"] }

Whether a pattern fits a parameter is checked where there is a model.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

from recipes.tables import Table

LossName = Literal["attention_mse", "logit_kl", "cross_entropy"]
Schedule = Literal["cosine", "constant"]
StageDtype = Literal["float32", "bfloat16"]
LOSSES: tuple[str, ...] = get_args(LossName)

MAX_SEED = 2**32 - 1  # what numpy takes for the order of the data
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # it names a folder


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank * B A, of which A and B train.

    Attributes:
        rank: columns of B and rows of A.
        alpha: scale, as published.
        targets: patterns of the names of linear layers, such as "*.q_proj".

    Raises:
        ValueError: a number out of range, or no targets.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be a positive number, not {self.alpha}")
        if not self.targets:
            raise ValueError('lora.targets must not be empty; "*.q_proj" is a target')


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of fine-tuning; the module's docstring says what the fields are in a file.

    Attributes:
        name: letters, digits, "-" and "_": results lie in a folder of that name.
        loss: names of losses and their weights, all positive.
        train: patterns of the parameters that train; empty only with `lora`, whose parameters
            always do.
        steps, tokens: the length; one of them is None.
        lr: the highest learning rate.
        lr_groups: patterns and the rates of the parameters that they fit, the first one first.

    Raises:
        ValueError: in one line, the stage's name and what is wrong.
    """

    name: str
    loss: tuple[tuple[LossName, float], ...]
    train: tuple[str, ...]
    steps: int | None = None
    tokens: int | None = None
    lr: float
    lr_groups: tuple[tuple[str, float], ...] = ()
    warmup: int = 0
    schedule: Schedule = "cosine"
    lr_floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: StageDtype = "bfloat16"
    batch_size: int = 16
    context: int = 2048
    seed: int = 0
    temperature: float = 1.0
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"the name of a stage must be letters, digits, '-' and '_', not {self.name!r}"
            )
        for wrong in self._mistakes():
            raise ValueError(f"stage {self.name!r}: {wrong}")

    @property
    def weights(self) -> dict[LossName, float]:
        """The weight of each loss."""
        return dict(self.loss)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with the model as published."""
        return any(name != "cross_entropy" for name, _ in self.loss)

    @property
    def tokens_per_step(self) -> int:
        """Padding and masked tokens among them."""
        return self.batch_size * self.context

    @property
    def num_steps(self) -> int:
        """Steps of the optimizer; `tokens` are never exceeded."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return self.tokens // self.tokens_per_step

    def _mistakes(self) -> Iterator[str]:
        yield from self._mistakes_of_loss()
        if not self.train and self.lora is None:
            yield 'train must not be empty; ["*"] trains everything'
        if (self.steps is None) == (self.tokens is None):
            yield f"give steps or tokens, not {'neither' if self.steps is None else 'both'}"
        for key in ("steps", "batch_size", "context"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield f"{key} must be at least 1, not {value}"
        if self.tokens is not None and self.tokens < self.tokens_per_step:
            yield f"tokens must be at least one step of {self.tokens_per_step}, not {self.tokens}"
        for key, value in (("lr", self.lr), *((f"lr_groups.{k!r}", v) for k, v in self.lr_groups)):
            if not 0 < value < math.inf:
                yield f"{key} must be a positive number, not {value}"
        if not 0 <= self.warmup <= self.num_steps:
            yield f"warmup must be between 0 and {self.num_steps} steps, not {self.warmup}"
        for key, kind in (("schedule", Schedule), ("dtype", StageDtype)):
            value = getattr(self, key)
            if value not in get_args(kind):
                yield _unknown(key, value, get_args(kind))
        if not 0 <= self.lr_floor <= 1:
            yield f"lr_floor must be between 0 and 1, not {self.lr_floor}"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas must be two numbers from 0 to below 1, not {list(self.betas)}"
        if not 0 <= self.seed <= MAX_SEED:
            yield f"seed must be between 0 and {MAX_SEED}, not {self.seed}"
        for key in ("weight_decay", "clip"):
            if not 0 <= getattr(self, key) < math.inf:
                yield f"{key} must not be negative, but is {getattr(self, key)}"
        if not 0 < self.temperature < math.inf:
            yield f"temperature must be a positive number, not {self.temperature}"

    def _mistakes_of_loss(self) -> Iterator[str]:
        if not self.loss:
            yield f"loss must not be empty; known: {', '.join(LOSSES)}"
        for name, weight in self.loss:
            if name not in LOSSES:
                yield _unknown("loss", name, LOSSES)
            if not 0 < weight < math.inf:
                yield f"loss.{name} must be a positive number, not {weight}"


def read_stages(tables: Iterable[object]) -> tuple[Stage, ...]:
    """The [[stages]] of a recipe, as tomllib gave them.

    Raises:
        ValueError: in one line, an unknown key (the nearest known one is named), a missing one, a
            wrong type or value.
    """
    stages = []
    for index, values in enumerate(tables):
        if not isinstance(values, dict):
            raise ValueError(f"stages must be tables, each under [[stages]], not {values!r}")
        stages.append(_stage(values, f"stages[{index}]"))
    return tuple(stages)


def stage_values(stage: Stage) -> dict[str, object]:
    """The stage as a table that `read_stages` reads; what has its default is left out."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(Stage):
        value = getattr(stage, field.name)
        if value == field.default:
            continue
        if field.name == "loss" and len(value) == 1 and value[0][1] == 1:
            value = value[0][0]
        elif field.name in ("loss", "lr_groups"):
            value = dict(value)
        elif isinstance(value, Lora):
            value = vars(value)
        values[field.name] = value
    return values


def _stage(values: dict[str, object], path: str) -> Stage:
    known = tuple(field.name for field in dataclasses.fields(Stage))
    table = Table(values, path, known)

    def number(key: str, default: float | None = None) -> float:
        return float(table.get(key, (int, float), "a number", default))

    def whole(key: str) -> int | None:
        return table.get(key, int, "an integer") if key in table else None

    def integer(key: str, default: int) -> int:
        return table.get(key, int, "an integer", default)

    groups = table.get("lr_groups", dict, "a table of patterns and numbers", {})
    return Stage(
        name=table.get("name", str, "a string"),
        loss=_loss(table),
        train=table.strings("train", () if "lora" in table else None),
        steps=whole("steps"),
        tokens=whole("tokens"),
        lr=number("lr"),
        lr_groups=tuple(_numbers(groups, table.path("lr_groups"))),
        warmup=integer("warmup", Stage.warmup),
        schedule=cast(Schedule, table.get("schedule", str, "a string", Stage.schedule)),
        lr_floor=number("lr_floor", Stage.lr_floor),
        betas=cast("tuple[float, float]", table.numbers("betas", Stage.betas)),
        weight_decay=number("weight_decay", Stage.weight_decay),
        clip=number("clip", Stage.clip),
        dtype=cast(StageDtype, table.get("dtype", str, "a string", Stage.dtype)),
        batch_size=integer("batch_size", Stage.batch_size),
        context=integer("context", Stage.context),
        seed=integer("seed", Stage.seed),
        temperature=number("temperature", Stage.temperature),
        lora=_lora(table.get("lora", dict, "a table"), path) if "lora" in table else None,
    )


def _loss(table: Table) -> tuple[tuple[LossName, float], ...]:
    value: object = table.get("loss", (str, dict), "the name of a loss or a table of weights")
    if not isinstance(value, dict):
        return ((cast(LossName, value), 1.0),)  # checked by Stage
    return cast("tuple[tuple[LossName, float], ...]", tuple(_numbers(value, table.path("loss"))))


def _numbers(values: dict[str, object], path: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{path}.{key!r} must be a number, not {value!r}")
        yield key, float(value)


def _lora(values: dict[str, object], path: str) -> Lora:
    table = Table(values, f"{path}.lora", ("rank", "alpha", "targets"))
    return Lora(
        rank=table.get("rank", int, "an integer"),
        alpha=float(table.get("alpha", (int, float), "a number")),
        targets=table.strings("targets", None),
    )


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"there is no {what} {name!r}; {hint}"
