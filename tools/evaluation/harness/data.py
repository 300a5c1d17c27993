"""Local files of tasks, as rows with the fields of the published data sets that the harness reads.

Files have one JSON object a line, with `choices` and the index `label` of the right one; rows of
arc_*, openbookqa may say which `split` they are of. WikiText is one text.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.evaluation.recall.files import find_file
from tools.text_files import read_lines, read_text

Row = Mapping[str, object]

_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """One of the harness's tasks, on a local file.

    Attributes:
        summary: one line.
        folder: of the harness's definition, below lm_eval/tasks.
        stem: of the file's name.
        split: what the harness scores, "validation" or "test".
        convert: from a row of the file to one of the published data set.
        answers: of such a row, texts that a prompt must not give away; None: its continuations.
        text: the file is one text, of which every page is a row.
    """

    summary: str
    folder: str
    stem: str
    split: str
    convert: Callable[[Row], dict[str, object]] = dict
    answers: Callable[[Row], list[str]] | None = None
    text: bool = False


def _choices(row: Row) -> list[str]:
    choices = row["choices"]
    if not isinstance(choices, list):
        raise TypeError("choices")
    return choices


def _label(row: Row) -> int:
    label = row["label"]
    if not isinstance(label, int) or not 0 <= label < len(_choices(row)):
        raise TypeError("label")
    return label


def _lambada(row: Row) -> dict[str, object]:
    return {"text": f"{row['context']} {row['target']}"}


def _hellaswag(row: Row) -> dict[str, object]:
    kept = {name: row[name] for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**kept, "endings": _choices(row), "label": str(_label(row))}


def _piqa(row: Row) -> dict[str, object]:
    first, second = _choices(row)
    return {"goal": row["question"], "sol1": first, "sol2": second, "label": _label(row)}


def _lettered(row: Row) -> dict[str, object]:
    letters = list(_LETTERS[: len(_choices(row))])
    choices = {"text": _choices(row), "label": letters}
    return {"choices": choices, "answerKey": letters[_label(row)]}


def _arc(row: Row) -> dict[str, object]:
    return {"question": row["question"], **_lettered(row)}


def _openbookqa(row: Row) -> dict[str, object]:
    return {"question_stem": row["question"], **_lettered(row)}


def _winogrande(row: Row) -> dict[str, object]:
    first, second = _choices(row)
    answer = str(_label(row) + 1)
    return {"sentence": row["sentence"], "option1": first, "option2": second, "answer": answer}


def _options(row: Row) -> list[str]:
    return [str(row["option1"]), str(row["option2"])]


TASKS: dict[str, LocalTask] = {
    "lambada_openai": LocalTask(
        summary="the last word of a passage: acc, perplexity",
        folder="lambada",
        stem="lambada_openai",
        split="test",
        convert=_lambada,
    ),
    "hellaswag": LocalTask(
        summary="how a scene goes on, 4 choices: acc, acc_norm",
        folder="hellaswag",
        stem="hellaswag",
        split="validation",
        convert=_hellaswag,
    ),
    "piqa": LocalTask(
        summary="how to do a thing of everyday life, 2 choices: acc, acc_norm",
        folder="piqa",
        stem="piqa",
        split="validation",
        convert=_piqa,
    ),
    "arc_easy": LocalTask(
        summary="questions of school science, mostly 4 choices: acc, acc_norm",
        folder="arc",
        stem="arc_easy",
        split="test",
        convert=_arc,
    ),
    "arc_challenge": LocalTask(
        summary="the harder ones of these questions: acc, acc_norm",
        folder="arc",
        stem="arc_challenge",
        split="test",
        convert=_arc,
    ),
    "winogrande": LocalTask(
        summary="whom or what a sentence speaks of, 2 choices: acc",
        folder="winogrande",
        stem="winogrande",
        split="validation",
        convert=_winogrande,
        answers=_options,
    ),
    "openbookqa": LocalTask(
        summary="questions of elementary science, 4 choices: acc, acc_norm",
        folder="openbookqa",
        stem="openbookqa",
        split="test",
        convert=_openbookqa,
    ),
    "wikitext": LocalTask(
        summary="WikiText-2 by documents: word_perplexity, byte_perplexity, bits_per_byte",
        folder="wikitext",
        stem="wikitext2_raw_test",
        split="test",
        text=True,
    ),
}


def read_rows(name: str, data: Path) -> list[dict[str, object]]:
    """The rows of a task's split, in the order of its file.

    Raises:
        ValueError: in one line, a file that is missing, or a line that is not such a row.
    """
    task, path = TASKS[name], file_of(name, data)
    if task.text:
        return [{"page": page} for page in pages(read_text(path))]
    rows = []
    for number, line in enumerate(read_lines(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("split", task.split) == task.split:
                rows.append(task.convert(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: no row of {name} ({type(error).__name__}: {error})"
            ) from None
    if not rows:
        raise ValueError(f"{path} has no row of the {task.split} split, which {name} scores")
    return rows


def file_of(name: str, data: Path) -> Path:
    """The file of a task.

    Raises:
        ValueError: it is missing.
    """
    task = TASKS[name]
    return find_file(data, task.stem, name, ".txt" if task.text else ".jsonl")


def pages(text: str) -> Iterator[str]:
    """Cuts WikiText at the headings of its articles, as the harness's data set was cut.

    Two lines of an article on filters look like headings and count as such there too.
    """
    page: list[str] = []
    for line in text.split("\n"):
        joined = line.replace("= = =", "===").replace("= =", "==").strip()
        if joined.startswith("= ") and joined.endswith(" ="):
            if "\n".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)
