"""Charts and tables of reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anymamba.base.files import atomic_file
from anymamba.lab.experiment import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float = 7.0, height: float = 4.5) -> Figure:
    """An empty figure that needs no display; the sizes are in inches.

    Raises ImportError if matplotlib is missing, and names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('charts need matplotlib: pip install "anymamba[experiments]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.svg; the same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}), atomic_file(folder / f"{name}.svg") as temporary:
        figure.savefig(temporary, metadata={"Date": None})


def plot_learning(axes: Axes, results: Results, label: Callable[[str], str], dashed: Sequence[str] = ()) -> None:
    """Draw the accuracy on the validation set against the step, with a line per seed and a colour per arm."""
    for i, arm in enumerate(results.arms):
        for j, curve in enumerate(results.values(arm, "curve")):
            steps, values = [point[0] for point in curve], [100 * point[2] for point in curve]
            style = "--" if arm in dashed else "-"
            axes.plot(steps, values, style, color=f"C{i}", linewidth=1.2, label=label(arm) if j == 0 else None)
    axes.set_xlabel("step")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """The mean of some values, and the smallest and largest if there are several; "" if there are none."""
    scaled = [scale * value for value in values]
    if not scaled:
        return ""
    mean = f"{sum(scaled) / len(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ({min(scaled):.{digits}f} to {max(scaled):.{digits}f})"


def percent(share: float) -> str:
    """A share in percent, without the percent sign."""
    return f"{100 * share:.1f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign; "" for None."""
    return "" if value is None else f"{value:+.{digits}f}"
