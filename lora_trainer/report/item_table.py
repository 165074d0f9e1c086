"""How well single runs are known against one another: differences over held-out images, which say nothing of seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_trainer.evidence.statistics.paired import paired_test, smallest
from lora_trainer.report.comparison import ArmRuns
from lora_trainer.report.figure import Table
from lora_trainer.report.run_record import Row

CAPTION = (
    "Differences over held-out images, in percent of the base's loss: the precision of these runs alone, no evidence "
    "about their settings"
)


def item_table(groups: Sequence[ArmRuns]) -> Table | None:
    """Each run against the one with the smallest held-out loss of its seed, paired by image; None without a pair.

    They stand in the order given, and of equal losses the first is the smallest.
    """
    finals: dict[int, list[tuple[str, Row]]] = {}
    for group in groups:
        for run in group.runs:
            if run.is_finished and run.failure is None and run.final is not None:
                finals.setdefault(run.seed, []).append((group.name, run.final))
    rows = tuple(row for seed, named in sorted(finals.items()) for row in _rows(seed, named))
    return Table(CAPTION, ("pair", "seed", "images", "difference of loss", "± over images"), rows) if rows else None


def _rows(seed: int, named: Sequence[tuple[str, Row]]) -> Iterator[tuple[str, ...]]:
    best, least = named[place := smallest([final["relative"] for _, final in named])]
    for name, final in (*named[:place], *named[place + 1 :]):
        differences = [100 * (a - b) for a, b in zip(least["items"], final["items"], strict=True)]
        test = paired_test(differences)
        yield f"{best} − {name}", str(seed), str(len(differences)), f"{test.mean:z.3f} %", f"{test.se:.3f}"
