"""Stop strings, found anywhere in the text, wherever the tokens happen to be cut.

The generation stops where the first stop string is complete; of two that end at one place the
longer counts. So the result depends on the text alone, not on its tokens.
"""

from collections.abc import Sequence


class StopMatcher:
    """Text in, text to show out, until a stop string is complete.

    With ``keep`` the matched text is shown too, and nothing need be held back. Without it, a tail
    that may yet become a stop string is held until that is decided.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._inner = frozenset("".join(stop[:-1] for stop in self._stops))
        """Characters that a stop string may go on behind."""
        self._keep = keep
        self._tail = ""
        self._tail_shown = False
        self.matched = False

    def push(self, text: str) -> str:
        """Take text; returns what may be shown. Sets ``matched`` when a stop string is complete."""
        if not self._stops:
            return text
        num_shown = len(self._tail) if self._tail_shown else 0
        window = self._tail + text
        match = self._first_match(window)
        if match is not None:
            self.matched = True
            self._tail = ""
            start, end = match
            return window[num_shown : end if self._keep else start]
        cut = len(window) - self._partial_length(window)
        self._tail, self._tail_shown = window[cut:], self._keep
        return window[num_shown:] if self._keep else window[num_shown:cut]

    def flush(self) -> str:
        """The text still held back, for an end that no stop string caused."""
        held = "" if self._tail_shown else self._tail
        self._tail = ""
        return held

    def _first_match(self, window: str) -> tuple[int, int] | None:
        found = [
            (start + len(stop), start) for stop in self._stops if (start := window.find(stop)) >= 0
        ]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _partial_length(self, window: str) -> int:
        """Length of the longest tail of ``window`` that a stop string begins with."""
        if window[-1:] not in self._inner:  # nearly always
            return 0
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(window)), 0, -1):
            tail = window[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
