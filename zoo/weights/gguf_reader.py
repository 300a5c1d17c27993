"""open_gguf: the gguf package's own reader, made faster, with errors in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt


def open_gguf(path: Path, rest: Sequence[Path] = ()) -> gguf.GGUFReader:
    """Opens a GGUF file, or the first piece of one and the `rest` in order.

    Raises:
        ValueError: one line: missing, not GGUF, truncated, or of another kind of machine.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
    try:
        reader = _PlainReader(path, rest)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is truncated or damaged, get it again: {reason}") from None
    if reader.byte_order == "S":
        raise ValueError(f"{path} is in the byte order of another kind of machine")
    split = reader.fields.get("split.count")
    if split is not None and split.contents() > 1:
        raise ValueError(
            f"{path} is one of several parts; join them with llama-gguf-split --merge"
        )
    return reader


class _PlainReader(gguf.GGUFReader):
    """GGUFReader over a plain array: slicing np.memmap makes reading 100,000 strings take 5 s.

    Pieces of a file become one array in memory, so that nothing is written to a disk. Arrays of
    numbers are read as a whole: the scores and kinds of 262,144 tokens one by one take 3 s.
    """

    def __init__(self, path: Path, rest: Sequence[Path]) -> None:
        self._rest = rest
        super().__init__(path)

    @property  # type: ignore[override]
    def data(self) -> npt.NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, value: npt.NDArray[np.uint8]) -> None:
        pieces = [np.memmap(path, mode="r") for path in self._rest]
        self._data = np.concatenate([value, *pieces]) if pieces else value.view(np.ndarray)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[gguf.GGUFValueType]]:
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            each = gguf.GGUFValueType(kind[0])
            if each in self.gguf_scalar_to_np:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[each], int(count[0]))
                if len(values) < count[0]:
                    raise ValueError("an array is cut off")
                types = [gguf.GGUFValueType.ARRAY, each]
                return 12 + values.nbytes, [kind, count, values], [2], types
        return super()._get_field_parts(orig_offs, raw_type)
