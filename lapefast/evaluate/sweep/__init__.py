"""The sweep: steering from every language to every other, and how often it gets there.

Tang et al., ACL 2024, arXiv 2402.16438, section 4.4: the neurons of the language that a prompt is
in are deactivated and those of another one activated, and the language of the answer is looked at.
"""

from __future__ import annotations

from lapefast.evaluate.sweep.result import Sweep, SweepRow
from lapefast.evaluate.sweep.run import sweep
from lapefast.evaluate.sweep.summary import Outcome, PairSummary, mean_of_pairs

__all__ = ["Outcome", "PairSummary", "Sweep", "SweepRow", "mean_of_pairs", "sweep"]
