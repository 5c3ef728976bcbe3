"""How often this process gave a generation to another worker, by cause: shown by every process."""

from common.instruments import Counts

REDELIVERIES = Counts(
    "headrace_redeliveries_total",
    "Generations that this process gave to another worker: lease (theirs was lost), release, yield,"
    " diverged, beat.",
    ["cause"],
)
"""Each cause has its series from the start: of one that begins with 1 no increase is seen."""

for _cause in ("lease", "release", "yield", "diverged", "beat"):
    REDELIVERIES.add(0, _cause)
