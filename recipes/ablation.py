"""read_ablation: what `zoo ablate` sweeps, as a TOML file.

model = "smollm2-135m-instruct"       # a name that zoo.load takes
rules = ["uniform", "random", "greedy_retrieval"]
counts = [2, 4, 6]                    # exact layers
seeds = [0, 1, 2]                     # of "random", a placement for each
window_sizes = [256]                  # with every chunk size that divides it
chunk_sizes = [16]
attention = "eva_attention"           # of the other layers; or "window_attention"
[eva]                                 # optional: other fields of flasheva.EvaConfig
[search]                              # optional: what searched rules read, as `zoo place`
contexts = [1024, 2048]
texts = ["books.txt"]                 # relative to this file
[judge]                               # what every placement is judged by, as `zoo evaluate`
tasks = ["passkey", "needle"]
contexts = [2048]
n = 200
perplexity_text = "wikitext.txt"      # optional
[judge.speed]                         # optional: decoding is timed
prompt = 2048
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, get_args

from recipes.placement import SEARCHED, Rule
from recipes.schema import Attention, EvaValue, eva_table
from recipes.tables import Table

RULES = (*get_args(Rule), *SEARCHED)


def _check_filled(table: object, path: str, *names: str) -> None:
    for name in names:
        if not getattr(table, name):
            raise ValueError(f"{path}{'.' if path else ''}{name} must not be empty")


def _check_least(table: object, path: str, least: Mapping[str, int]) -> None:
    for name, number in least.items():
        if getattr(table, name) < number:
            raise ValueError(
                f"{path}.{name} must be at least {number}, not {getattr(table, name)}"
            )


@dataclass(frozen=True, kw_only=True)
class SearchTable:
    """What searched rules read; fields as the options of `zoo place`."""

    contexts: tuple[int, ...] = (1024, 2048)
    n: int = 4
    seeds: tuple[int, ...] = (0,)
    texts: tuple[Path, ...] = ()
    text: Path | None = None
    window: int = 2048
    windows: int = 8
    data: Path | None = None
    limit: int = 100
    far: int = 1024
    exchanges: int = 0
    steps: int = 100
    batch_size: int = 8

    def __post_init__(self) -> None:
        _check_filled(self, "search", "contexts", "seeds")
        least = {"n": 1, "window": 2, "windows": 1, "limit": 1, "steps": 1, "batch_size": 1}
        _check_least(self, "search", least | {"far": 0, "exchanges": 0})


@dataclass(frozen=True, kw_only=True)
class SpeedTable:
    """A batch whose decoding is timed."""

    batch_size: int = 16
    prompt: int = 2048
    new: int = 64

    def __post_init__(self) -> None:
        # The first steps are not timed.
        _check_least(self, "judge.speed", {"batch_size": 1, "prompt": 1, "new": 4})


@dataclass(frozen=True, kw_only=True)
class JudgeTable:
    """What placements are judged by; fields as the options of `zoo evaluate`.

    Attributes:
        texts: prose of the judge half, each of which the tasks are scored with.
        teacher_forcing: recall tasks are scored by whether each token of the answer is the most
            likely one behind the true ones, all placements together; else by what is written.
        perplexity_text, window, windows: as `zoo perplexity`; None: no perplexity.
        speed: None: decoding is not timed.
    """

    tasks: tuple[str, ...]
    contexts: tuple[int, ...] = (2048,)
    n: int = 200
    seed: int = 1
    texts: tuple[Path, ...] = ()
    data: Path | None = None
    limit: int | None = None
    far: int = 1024
    batch_size: int = 16
    teacher_forcing: bool = False
    perplexity_text: Path | None = None
    window: int = 2048
    windows: int = 8
    speed: SpeedTable | None = None

    def __post_init__(self) -> None:
        _check_filled(self, "judge", "contexts")
        _check_least(self, "judge", {"n": 1, "far": 0, "batch_size": 1, "window": 2, "windows": 1})
        if self.limit is not None:
            _check_least(self, "judge", {"limit": 1})


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A sweep over rules, counts, seeds and sizes."""

    model: str
    rules: tuple[str, ...]
    counts: tuple[int, ...]
    judge: JudgeTable
    seeds: tuple[int, ...] = (0, 1, 2)
    window_sizes: tuple[int, ...] = (256,)
    chunk_sizes: tuple[int, ...] = (16,)
    attention: Attention = "eva_attention"
    eva: Mapping[str, EvaValue] = field(default_factory=dict)
    search: SearchTable = SearchTable()

    def __post_init__(self) -> None:
        _check_filled(self, "", "rules", "counts", "seeds", "window_sizes", "chunk_sizes")
        for size in (*self.window_sizes, *self.chunk_sizes):
            if size < 1:
                raise ValueError(f"a window or chunk size must be at least 1, not {size}")
        for rule in self.rules:
            if rule not in RULES:
                near = difflib.get_close_matches(rule, RULES, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RULES)}"
                raise ValueError(f"there is no rule {rule!r}; {hint}")
        for count in self.counts:
            if count < 1:
                raise ValueError(f"a count must be at least 1, not {count}")
        for key in ("window_size", "chunk_size"):
            if key in self.eva:
                raise ValueError(f"write {key}s = [{self.eva[key]}] in the place of eva.{key}")
        if not self.sizes:
            raise ValueError("no chunk size divides a window size")
        if self.attention not in get_args(Attention):
            choices = ", ".join(repr(choice) for choice in get_args(Attention))
            raise ValueError(f"attention must be one of {choices}, not {self.attention!r}")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of a window size and a chunk size that divides it."""
        return tuple((w, c) for w in self.window_sizes for c in self.chunk_sizes if w % c == 0)


def read_ablation(path: Path) -> Ablation:
    """Reads an ablation recipe; paths in it are relative to it.

    Raises:
        ValueError: in one line, the path and what is wrong.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (at byte {error.start})") from None
    try:
        return _parse(tomllib.loads(text), path.parent)
    except ValueError as error:  # also of tomllib
        raise ValueError(f"{path}: {error}") from None


def _parse(values: dict[str, object], folder: Path) -> Ablation:
    known = tuple(Ablation.__dataclass_fields__)
    table = Table(values, "", known)
    return Ablation(
        model=table.get("model", str, "the name of a model"),
        rules=table.strings("rules", None),
        counts=table.ints("counts"),
        judge=_judge(table.get("judge", dict, "a table"), folder),
        seeds=table.ints("seeds", Ablation.seeds),
        window_sizes=table.ints("window_sizes", Ablation.window_sizes),
        chunk_sizes=table.ints("chunk_sizes", Ablation.chunk_sizes),
        attention=cast(Attention, table.get("attention", str, "a string", Ablation.attention)),
        eva=eva_table(table.get("eva", dict, "a table", {})),
        search=_search(table.get("search", dict, "a table", {}), folder),
    )


def _search(values: dict[str, object], folder: Path) -> SearchTable:
    table = Table(values, "search", tuple(SearchTable.__dataclass_fields__))
    default = SearchTable()
    return SearchTable(
        contexts=table.ints("contexts", default.contexts),
        seeds=table.ints("seeds", default.seeds),
        texts=_paths(table, "texts", folder),
        text=_path(table, "text", folder),
        data=_path(table, "data", folder),
        n=_int(table, "n", default.n),
        window=_int(table, "window", default.window),
        windows=_int(table, "windows", default.windows),
        limit=_int(table, "limit", default.limit),
        far=_int(table, "far", default.far),
        exchanges=_int(table, "exchanges", default.exchanges),
        steps=_int(table, "steps", default.steps),
        batch_size=_int(table, "batch_size", default.batch_size),
    )


def _judge(values: dict[str, object], folder: Path) -> JudgeTable:
    table = Table(values, "judge", tuple(JudgeTable.__dataclass_fields__))
    default = JudgeTable(tasks=())
    return JudgeTable(
        tasks=table.strings("tasks", None),
        contexts=table.ints("contexts", default.contexts),
        texts=_paths(table, "texts", folder),
        data=_path(table, "data", folder),
        perplexity_text=_path(table, "perplexity_text", folder),
        limit=_int(table, "limit", 0) if "limit" in table else None,
        n=_int(table, "n", default.n),
        seed=_int(table, "seed", default.seed),
        far=_int(table, "far", default.far),
        batch_size=_int(table, "batch_size", default.batch_size),
        teacher_forcing=table.get("teacher_forcing", bool, "true or false", False),
        window=_int(table, "window", default.window),
        windows=_int(table, "windows", default.windows),
        speed=_speed(table.get("speed", dict, "a table")) if "speed" in table else None,
    )


def _speed(values: dict[str, object]) -> SpeedTable:
    table = Table(values, "judge.speed", tuple(SpeedTable.__dataclass_fields__))
    default = SpeedTable()
    return SpeedTable(
        batch_size=_int(table, "batch_size", default.batch_size),
        prompt=_int(table, "prompt", default.prompt),
        new=_int(table, "new", default.new),
    )


def _int(table: Table, key: str, default: int) -> int:
    return table.get(key, int, "an integer", default)


def _path(table: Table, key: str, folder: Path) -> Path | None:
    return folder / table.get(key, str, "a path") if key in table else None


def _paths(table: Table, key: str, folder: Path) -> tuple[Path, ...]:
    return tuple(folder / path for path in table.strings(key))
