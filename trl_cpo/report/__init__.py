"""A report of training runs, from their JSON and logs alone: an HTML page with its pictures, and these as PNGs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .reading import NotARun, of_runs, read_runs
from .run import Run
from .writing import check_free, write

__all__ = ["NotARun", "Report", "make_report"]


@dataclass(frozen=True)
class Report:
    """What was made: the page, the pictures beside it, the runs as they were read, and what has to be known of them."""

    page: Path
    pictures: list[Path]
    runs: list[Run]
    notes: list[str]


def make_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Reads the runs, draws what they allow, and writes `report.html` and the PNGs into `out`.

    Args:
        folders: the runs' folders, each with any of log.jsonl, metrics.json and pairs.json.
        out: where to write, by default `report` inside the first run's folder. A report that stands there is replaced if
            nobody has changed it; nothing else is.

    Raises:
        NotARun: a folder is no run's.
        FileExistsError: `out` holds files that this does not replace.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = read_runs(folders)
    out = Path(folders[0]) / "report" if out is None else Path(out)
    check_free(out)
    # matplotlib is an extra, and the last thing that can be wanting.
    from .page import render
    from .pictures import draw

    notes, pictures = of_runs(runs), draw(runs)
    drawn = {f"{picture.kind.name}.png": picture.png for picture in pictures if picture.png}
    page = "report.html"
    write(out, {**drawn, page: render(runs, notes, pictures).encode("utf-8")})
    return Report(out / page, [out / name for name in drawn], runs, notes)
