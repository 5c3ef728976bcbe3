"""Keeps the log directory bounded: a log that is large enough is moved away and compressed.

Each process follows its file's name (:class:`common.logs.LineSink`), so what was moved is complete
a moment later. A moved log is named for the time, as ``gateway-20260101T000000Z.jsonl.gz``.
"""

import asyncio
import gzip
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from common.logs import get_logger

log = get_logger()

_LOOK_S = 10.0
_SETTLE_S = 5.0
"""Whoever still has the old file open looks after its name once a second."""
_FAST = 1
"""A tenth of the size in a hundredth of a second for each megabyte."""


class LogRotation:
    """Of all ``<role>.jsonl`` in ``log_dir``: each at most ``max_bytes``, and ``num_kept`` old ones
    of each role.
    """

    def __init__(self, log_dir: Path, *, max_bytes: int, num_kept: int) -> None:
        self._log_dir = log_dir
        self._max_bytes = max_bytes
        self._num_kept = num_kept

    async def keep_rotating(self) -> None:
        """Look every few seconds until cancelled; what fails is tried again."""
        while True:
            try:
                await asyncio.to_thread(self.rotate)
            except OSError as error:
                log.warning("storage.failed", error=f"log rotation: {error}"[:500])
            await asyncio.sleep(_LOOK_S)

    def rotate(self) -> None:
        """One look: move what is too large, compress what was moved before, drop the oldest.

        Raises: OSError.
        """
        logs = sorted(self._log_dir.glob("*.jsonl"))
        for path in logs:
            if "-" in path.stem:
                self._compress(path)
            elif path.stat().st_size > self._max_bytes:
                moved_at = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
                path.rename(path.with_name(f"{path.stem}-{moved_at}.jsonl"))
        for role in {path.stem.partition("-")[0] for path in logs}:
            old = sorted(self._log_dir.glob(f"{role}-*.jsonl.gz"))
            for path in old[: max(0, len(old) - self._num_kept)]:
                path.unlink(missing_ok=True)

    def _compress(self, path: Path) -> None:
        if time.time() - path.stat().st_ctime < _SETTLE_S:
            return
        packed = path.with_name(f"{path.name}.gz")
        unfinished = packed.with_suffix(".part")
        with path.open("rb") as lines, gzip.open(unfinished, "wb", compresslevel=_FAST) as file:
            shutil.copyfileobj(lines, file)
        unfinished.replace(packed)
        path.unlink()
