"""ResultRows: a file of results of placements, without the same measurement twice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from tools.entry import command_line
from tools.results import append_result, device_name


class ResultRows:
    """Rows that are there, and new ones.

    Args:
        path: the file.
        device: where everything is measured.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        self._there: dict[str, float] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    key = _key(row["case"], row["metric"], row["device"])
                    self._there[key] = float(row["value"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut by a kill

    def has(self, case: Mapping[str, object], metric: str) -> bool:
        """Whether this was measured, here or in an earlier run on such a device."""
        return self.value(case, metric) is not None

    def value(self, case: Mapping[str, object], metric: str) -> float | None:
        """What was measured, or None."""
        return self._there.get(_key(case, metric, device_name(self._device)))

    def add(
        self,
        case: Mapping[str, object],
        metric: str,
        value: float,
        *,
        impl: str,
        unit: str = "",
        spread: float | None = None,
    ) -> None:
        """Adds a row, unless it is there."""
        if self.has(case, metric):
            return
        append_result(
            self._path,
            bench="placement",
            case=case,
            impl=impl,
            metric=metric,
            value=value,
            unit=unit,
            spread=spread,
            device=self._device,
            command=command_line(),
        )
        self._there[_key(case, metric, device_name(self._device))] = value


def _key(case: Mapping[str, object], metric: str, device: str) -> str:
    plain = cast("dict[str, object]", json.loads(json.dumps(dict(case))))
    return json.dumps([plain, metric, device], sort_keys=True)
