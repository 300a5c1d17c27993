"""table: recorded times of kernels as the Markdown table of docs/kernels.md."""

from collections.abc import Iterable, Mapping
from typing import cast

OURS = "triton"
_SETTINGS = ("dtype", "W", "P", "bias", "cuda_graph")
_PASSES = {"forward": "forward", "forward_backward": "both"}

Row = Mapping[str, object]
_Case = tuple[str, str, str | None, int | None]  # shape, pass, window, sinks


def table(rows: Iterable[Row]) -> str:
    """Our time for every shape, pass and window, what sinks cost of it, and what others take.

    Of two rows of the same measurement the last counts. Others without a window of theirs (full
    attention, recurrent) stand beside both of ours.

    Raises:
        ValueError: no time of ours is among the rows, or ours differ in more than the columns say.
    """
    found: dict[tuple[_Case, str, str], float] = {}
    settings: set[tuple[object, ...]] = set()
    for row in rows:
        given = cast("Mapping[str, str]", row["case"])
        if row["bench"] == "kernels" and "shape" in given:
            if row["impl"] == OURS:
                settings.add((row["device"], *(given.get(name) for name in _SETTINGS)))
            sinks = cast("int | None", given["S"])
            key = (given["shape"], given["pass"], given["window"], sinks)
            found[key, str(row["impl"]), str(row["metric"])] = cast("float", row["value"])
    ours = [case for case, impl, metric in found if (impl, metric) == (OURS, "time")]
    cases: list[_Case] = [case for case in ours if case[3] != 0] or ours
    if not cases:
        raise ValueError(f"a table needs times of {OURS}; there are none in these rows")
    if len(settings) > 1:
        raise ValueError(
            f"rows of a table share device, {', '.join(_SETTINGS)}; here are {len(settings)} such "
            "sets: put them into files of their own"
        )
    others = list(dict.fromkeys(impl for _, impl, _ in found if impl != OURS))
    head = ["B, H, T, D", "pass", "window", "ms", *(f"{name} takes" for name in others)]
    head += ["sinks cost", "roofline, with exp"]
    lines = [head, ["---"] * len(head)]
    for case in cases:
        shape, which, window, _ = case
        time = found[case, OURS, "time"]
        cells = [shape.replace(",", ", "), _PASSES[which], str(window), f"{time:.3f}"]
        for name in others:
            everybody: _Case = (shape, which, None, None)
            other = found.get((case, name, "time"), found.get((everybody, name, "time")))
            cells.append("" if other is None else f"{other / time:.2f} x")
        without = found.get(((shape, which, window, 0), OURS, "time"))
        cells.append("" if without is None else f"{100 * (time / without - 1):.1f} %")
        fractions = [
            found.get((case, OURS, f"roofline{end}")) for end in ("", "_with_exponentials")
        ]
        cells.append(", ".join(f"{100 * x:.0f} %" for x in fractions if x is not None))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
