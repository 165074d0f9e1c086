"""The early report, after the first epoch or a tenth of the run: is it learning, evenly, and does it carry over?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora_trainer.evidence.diagnosis.run_facts import RunFacts
from lora_trainer.evidence.diagnosis.series import detrended_scatter
from lora_trainer.evidence.diagnosis.trial_log import TrialLog
from lora_trainer.evidence.statistics.ties import ROUNDING

EARLY_SHARE = 0.1
CHANGES_FOR_SCATTER, CHANGES_FOR_CORRELATION = 4, 3


@dataclass(frozen=True, slots=True)
class EarlyReport:
    """Three numbers and their precision; None is not measured."""

    step: int
    gain: float
    """Of the held-out loss over the base's."""
    gain_per_update: float
    gain_per_update_se: float
    """Over the probe's images: the precision of this run."""
    instability: float | None
    """Scatter of the changes between probes as a share of the gain; needs five probes."""
    train_gain: float | None
    correlation: float | None
    """Of the changes of the training and the held-out probe; needs four probes."""

    def as_event(self) -> dict[str, Any]:
        content = asdict(self)
        del content["step"]
        return {key: None if value is None else round(value, 9) for key, value in content.items()}

    @property
    def sentences(self) -> list[str]:
        """For people."""
        per, se = 100 * self.gain_per_update, 100 * self.gain_per_update_se
        sure = "" if abs(self.gain_per_update) > 2 * self.gain_per_update_se else ": not clear of 0 yet"
        said = [f"held-out loss gains {per:+z.4f} +- {se:.4f} % of the base's per update{sure}"]
        if self.instability is None:
            said.append("instability not measured (needs five probes)")
        else:
            said.append(f"changes between probes scatter by {self.instability:.2f} of the gain")
        if self.train_gain is None:
            said.append("whether validation follows training was not measured")
        elif self.train_gain <= ROUNDING:
            said.append(f"the training images gained nothing yet ({self.train_gain:+z.4f})")
        else:
            correlation = "" if self.correlation is None else f", correlation of their changes {self.correlation:.2f}"
            said.append(f"validation gains {self.gain / self.train_gain:.0%} of what training gains{correlation}")
        return said


def early_report(log: TrialLog, run: RunFacts) -> EarlyReport | None:
    """What the probes say up to the first one after both an epoch and a tenth of the run; None before that."""
    due = max(run.updates_per_epoch, math.ceil(EARLY_SHARE * run.num_updates))
    late = log.held_out.at_or_after(due)
    return _report(log, late[0]) if late and late[0] > 0 else None


def _report(log: TrialLog, last: int) -> EarlyReport:
    """What the measurements 0 to `last` say."""
    probe, train = log.held_out, log.train
    held_out_means, train_means = probe.means[: last + 1], train.means[: last + 1]
    step, rise = probe.steps[last], probe.change(0, last)
    scatter = detrended_scatter(held_out_means) if last >= CHANGES_FOR_SCATTER else None
    both = len(train) > last
    correlation = None
    if both and last >= CHANGES_FOR_CORRELATION:
        changes = np.diff(train_means), np.diff(held_out_means)
        correlation = float(np.corrcoef(*changes)[0, 1]) if min(map(np.ptp, changes)) > ROUNDING else None
    return EarlyReport(
        step=step,
        gain=-rise.mean,
        gain_per_update=-rise.mean / step,
        gain_per_update_se=rise.se / step,
        instability=scatter / abs(rise.mean) if scatter is not None and abs(rise.mean) > ROUNDING else None,
        train_gain=-train.change(0, last).mean if both else None,
        correlation=correlation,
    )
