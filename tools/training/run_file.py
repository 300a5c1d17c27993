"""begin: run.json, which says what a run is made of, and keeps others out of its folder."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import torch

from recipes import recipe_text
from tools.results import device_name
from tools.training.data.batches import Batches
from tools.training.data.writing import alone
from tools.training.models import Conversion
from tools.training.preflight import remove_leftovers
from tools.training.ranks import Ranks
from zoo.weights.atomic import write_text

RUN_FILE = "run.json"

# What a run must go on with, and what is said of a folder that has another.
_DIFFERENCES = {
    "recipe": "another recipe",
    "base": "another base ({before[base]}, now {now[base]})",
    "weights": "another --weights ({before[weights]}, now {now[weights]})",
    "base_checksum": (
        "other weights of {now[base]} ({before[base_source]}, checksum {before[base_checksum]}; "
        "now {now[base_source]}, checksum {now[base_checksum]})"
    ),
    "batches": "other tokens, shares of sources, batch or context",
}


def begin(
    stack: ExitStack,
    out: Path,
    conversion: Conversion,
    deals: Sequence[Batches],
    command: str,
    ranks: Ranks,
) -> None:
    """Writes run.json, or sees that it is of this run; until `stack` ends, nobody else can.

    Args:
        stack: holds the lock.
        out: folder of the run; made, or of the same run.
        conversion: what is trained; all weights of its base are read once.
        deals: the batches of every stage.
        command: the command line.
        ranks: the processes, of which the first one calls this.

    Raises:
        ValueError: a folder of another run or of something else, weights that cannot be had, or
            another process that writes there.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must name a folder, and {out} is a file")
    path = out / RUN_FILE
    # A kill may have left a run.json that has not got its name.
    if out.is_dir() and not path.exists() and any(p.name[0] != "." for p in out.iterdir()):
        raise ValueError(f"will not write to {out}, which has files but no {RUN_FILE}")
    now = _made_of(conversion, deals)
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(alone(out))
    remove_leftovers(out)
    if path.exists():
        before = {**now, **_read(path)}  # run.json may be older than one of the keys
        for key, difference in _DIFFERENCES.items():
            if before[key] != now[key]:
                raise ValueError(
                    f"{out} is of a run with {difference.format(before=before, now=now)}; go on "
                    "with the same, or name a new folder"
                )
        return
    facts = {
        "command": command,
        "device": device_name(ranks.device),
        "processes": ranks.count,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host_cpus": os.cpu_count(),
    }
    write_text(path, json.dumps({**now, **facts}, indent=1) + "\n")


def _made_of(conversion: Conversion, deals: Sequence[Batches]) -> dict[str, object]:
    weights = conversion.base_weights()
    return {
        "recipe": recipe_text(conversion.recipe),
        "base": conversion.base,
        "weights": conversion.weights,
        "base_source": weights.source,  # which may move, unlike what has its checksum
        "base_checksum": weights.checksum,
        "batches": [batches.state_dict()["plan"] for batches in deals],
    }


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not of a run; name a new folder")
    return found
