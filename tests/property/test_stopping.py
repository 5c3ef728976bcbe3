"""For any text, stop strings and cuts into tokens: the end depends on the text alone."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.stopping import StopMatcher

TEXT = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def end_of(text: str, stops: list[str], keep: bool) -> tuple[str, bool]:
    """The rule, one character at a time: the obvious way, and the slow one."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if keep else end - max(map(len, ending))], True
    return text, False


@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 30)))
def test_any_cut_gives_the_same_end(
    text: str, stops: list[str], keep: bool, cuts: list[int]
) -> None:
    matcher = StopMatcher(stops, keep=keep)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = ""
    for start, end in pairwise(bounds):
        shown += matcher.push(text[start:end])
        assert end_of(text, stops, keep)[0].startswith(shown)
        if matcher.matched:
            break
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == end_of(text, stops, keep)
