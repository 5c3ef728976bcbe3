"""Stop strings: where a text ends, whatever its tokens."""

import pytest

from workers.engine.stopping import StopMatcher


def shown(matcher: StopMatcher, *texts: str) -> list[str]:
    return [matcher.push(text) for text in texts]


def test_text_without_stop_strings_passes_at_once() -> None:
    matcher = StopMatcher([], keep=False)
    assert shown(matcher, "a", "", "b") == ["a", "", "b"]
    assert not matcher.matched
    assert matcher.flush() == ""


def test_a_stop_inside_a_token_cuts_the_token() -> None:
    matcher = StopMatcher(["END"], keep=False)
    assert shown(matcher, "so xENDy") == ["so x"]
    assert matcher.matched


def test_keep_shows_the_stop_and_nothing_behind_it() -> None:
    matcher = StopMatcher(["END"], keep=True)
    assert shown(matcher, "so xENDy") == ["so xEND"]
    assert matcher.matched


def test_a_possible_stop_is_held_until_it_is_none() -> None:
    """What turns out not to be a stop is shown with the text that decided it."""
    matcher = StopMatcher(["\n\nUser:"], keep=False)
    assert shown(matcher, "Hi", "\n", "\n", "Us", "ual") == ["Hi", "", "", "", "\n\nUsual"]
    assert not matcher.matched


def test_a_stop_across_tokens_is_never_shown() -> None:
    matcher = StopMatcher(["\n\nUser:"], keep=False)
    assert shown(matcher, "Hi\n", "\n", "Us", "er: x") == ["Hi", "", "", ""]
    assert matcher.matched


def test_with_keep_nothing_is_held() -> None:
    """The text is shown in any case, so there is no reason to wait."""
    matcher = StopMatcher(["abc"], keep=True)
    assert shown(matcher, "xa", "b", "b", "ab", "cd") == ["xa", "b", "b", "ab", "c"]
    assert matcher.matched


def test_a_stop_can_begin_inside_a_failed_one() -> None:
    matcher = StopMatcher(["aab"], keep=False)
    assert shown(matcher, "a", "a", "a", "b") == ["", "", "a", ""]
    assert matcher.matched


@pytest.mark.parametrize(("keep", "expected"), [(False, "x"), (True, "xbc")])
def test_the_stop_that_is_complete_first_wins(keep: bool, expected: str) -> None:
    """As if the text had come one character at a time."""
    matcher = StopMatcher(["bcde", "bc"], keep=keep)
    assert shown(matcher, "xbcde") == [expected]


def test_of_two_that_end_together_the_longer_counts() -> None:
    matcher = StopMatcher(["c", "bc"], keep=False)
    assert shown(matcher, "abcd") == ["a"]


def test_held_text_is_flushed_at_another_end() -> None:
    matcher = StopMatcher(["END"], keep=False)
    assert shown(matcher, "the EN") == ["the "]
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_empty_stop_strings_mean_nothing() -> None:
    matcher = StopMatcher([""], keep=False)
    assert shown(matcher, "abc") == ["abc"]
    assert not matcher.matched
