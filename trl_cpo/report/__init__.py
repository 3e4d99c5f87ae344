"""Makes a report of training runs from their JSON and logs: an HTML page with pictures, and the pictures as PNGs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .reading import NotARun, of_runs, read_runs
from .run import Run
from .writing import check_free, write

__all__ = ["NotARun", "Report", "make_report"]


@dataclass(frozen=True)
class Report:
    """What was made: the page, the PNGs beside it, the runs as read, and notes on comparing them."""

    page: Path
    pictures: list[Path]
    runs: list[Run]
    notes: list[str]


def make_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Reads the runs, draws every picture their files allow, and writes `report.html` and the PNGs to `out`.

    Args:
        folders: the runs' folders, each with any of log.jsonl, metrics.json and pairs.json, and price.json if it was measured.
        out: folder to write to, by default `report` in the first run's folder. An earlier report there is replaced if
            it is unchanged; nothing else is.

    Raises:
        NotARun: a folder is not a run's.
        FileExistsError: `out` holds anything but an unchanged report.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = read_runs(folders)
    out = Path(folders[0]) / "report" if out is None else Path(out)
    check_free(out)
    # matplotlib is optional: import it only after all other checks.
    from .page import render
    from .pictures import draw

    notes, pictures = of_runs(runs), draw(runs)
    drawn = {f"{picture.kind.name}.png": picture.wide.png for picture in pictures if picture.wide}
    page = "report.html"
    write(out, {**drawn, page: render(runs, notes, pictures).encode("utf-8")})
    return Report(out / page, [out / name for name in drawn], runs, notes)
