"""Where sequences lie, and what of earlier ones they find there."""

import pytest

from common.models.tokenizer import Tokenizer
from tests.support.engines import request
from tests.support.tiny_model import build_tokenizer
from workers.engine.places import PagePlaces, Places, SlotPlaces, digests
from workers.engine.port import EngineRequest
from workers.engine.sequence import Sequence, TextRules

RULES = TextRules(Tokenizer(build_tokenizer(), {}), frozenset())
BLOCK = 4
PREFIX = list(range(70, 70 + 5 * BLOCK))


def sequence(id: str, prompt: list[int], scope: str = "") -> Sequence:
    plain = request(id, prompt, max_new_tokens=500)
    return Sequence(EngineRequest(id, prompt, plain.sampling, cache_scope=scope), RULES)


def slots(count: int = 3, capacity: int = 1000) -> SlotPlaces:
    return SlotPlaces(count, capacity, block_tokens=BLOCK)


def pages(count: int = 50) -> PagePlaces:
    return PagePlaces(count, page_tokens=BLOCK, max_sequences=3)


def run(places: Places, seq: Sequence) -> Sequence:
    """Admit it and compute all that it has, with finite logits behind it."""
    places.begin_step()
    assert places.admit(seq)
    seq.num_computed = seq.num_tokens
    places.prove(seq)
    return seq


def end(places: Places, seq: Sequence, *, is_sound: bool = True) -> None:
    places.release(seq, is_sound=is_sound)
    seq.num_computed = 0


def found(places: Places, seq: Sequence) -> int:
    """How much of it is there when it comes."""
    places.begin_step()
    assert places.admit(seq)
    return seq.num_computed


@pytest.fixture(params=[slots, pages])
def places(request: pytest.FixtureRequest) -> Places:
    return request.param()


def test_an_ended_one_leaves_its_prefix_to_the_next(places: Places) -> None:
    end(places, run(places, sequence("a", [*PREFIX, 1, 1])))
    assert found(places, sequence("b", [*PREFIX, 2, 2, 2])) == len(PREFIX)


def test_a_running_one_shares_its_prefix(places: Places) -> None:
    run(places, sequence("a", [*PREFIX, 1, 1]))
    assert found(places, sequence("b", [*PREFIX, 2, 2, 2])) == len(PREFIX)


def test_where_tokens_part_the_prefix_ends(places: Places) -> None:
    """Also when the same tokens come again behind the place where they part."""
    run(places, sequence("a", PREFIX))
    other = [*PREFIX[: 2 * BLOCK], 1, *PREFIX[2 * BLOCK + 1 :]]
    assert found(places, sequence("b", other)) == 2 * BLOCK
    assert found(places, sequence("c", [1, *PREFIX[1:]])) == 0


def test_another_scope_finds_nothing(places: Places) -> None:
    end(places, run(places, sequence("a", PREFIX, "one")))
    assert found(places, sequence("b", PREFIX, "two")) == 0


def test_nothing_is_shared_before_finite_logits(places: Places) -> None:
    seq = sequence("a", PREFIX[: 2 * BLOCK])
    assert found(places, seq) == 0
    seq.num_computed = 2 * BLOCK
    end(places, seq)
    assert found(places, sequence("b", PREFIX)) == 0


def test_who_fails_takes_down_what_it_had_found(places: Places) -> None:
    """Whether the fault came from the common part, nobody knows."""
    end(places, run(places, sequence("a", [*PREFIX, 1])))
    bad = sequence("bad", [*PREFIX, 2])
    assert found(places, bad) == len(PREFIX)
    end(places, bad, is_sound=False)
    assert found(places, sequence("b", [*PREFIX, 3])) == 0


def test_who_was_put_back_finds_its_own_answer(places: Places) -> None:
    """Not only prompts: the tokens it had made are computed as well."""
    seq = run(places, sequence("a", PREFIX))
    for _ in range(2 * BLOCK):
        seq.append(9)
        assert places.hold(seq)
        seq.num_computed = seq.num_tokens - 1
        places.prove(seq)
    end(places, seq)
    assert found(places, seq) == len(PREFIX) + BLOCK


def test_several_with_one_prefix_wait_for_the_first(places: Places) -> None:
    """Choices of one request come together; then one computes and the others find."""
    prompt = [70 + i % 9 for i in range(100)]
    first, second = sequence("a", prompt), sequence("b", prompt)
    assert found(places, first) == 0
    assert not places.admit(second)
    assert places.admit(sequence("stranger", [1] * 10))
    first.num_computed = first.num_tokens
    places.prove(first)
    assert found(places, second) >= 96


def test_a_short_prefix_is_not_waited_for(places: Places) -> None:
    assert found(places, sequence("a", PREFIX)) == 0
    assert found(places, sequence("b", PREFIX)) == 0


def test_the_first_to_go_releases_those_who_waited_for_it(places: Places) -> None:
    prompt = [70 + i % 9 for i in range(100)]
    first = sequence("a", prompt)
    found(places, first)
    end(places, first)
    assert found(places, sequence("b", prompt)) == 0


def test_the_oldest_makes_room() -> None:
    """Three prompts are kept; the one that ended first gives way to a stranger."""
    for places in (slots(3), pages(3 * 6)):
        for number in range(3):
            end(places, run(places, sequence(str(number), [number] * (5 * BLOCK + 1))))
        end(places, run(places, sequence("stranger", [9] * 6 * BLOCK)))
        hits = [found(places, sequence(str(i), [i] * (5 * BLOCK + 1))) for i in (1, 2)]
        assert hits == [5 * BLOCK, 5 * BLOCK]
        assert found(places, sequence("0", [0] * (5 * BLOCK + 1))) < 5 * BLOCK


# Slots -----------------------------------------------------------------------------------------


def test_a_freed_slot_is_gone_on_in() -> None:
    """No copy: the next turn of a conversation lies where the last one lay."""
    places = slots()
    first = run(places, sequence("a", PREFIX))
    slot = places.place_of(first).slot
    end(places, first)
    second = run(places, sequence("b", [*PREFIX, 1, 2, 3]))
    assert places.place_of(second).slot == slot
    assert places.place_of(second).copied_from is None


def test_a_prefix_in_use_is_copied() -> None:
    places = slots()
    first = run(places, sequence("a", PREFIX))
    second = run(places, sequence("b", [*PREFIX, 1]))
    source = places.place_of(first).slot
    assert places.place_of(second).slot != source
    assert places.place_of(second).copied_from == (source, len(PREFIX))


def test_a_long_conversation_is_not_given_up_for_its_short_beginning() -> None:
    """While there is another slot, its beginning is copied there."""
    places = slots(2)
    long = run(places, sequence("long", [*PREFIX, *[1] * 50]))
    kept = places.place_of(long).slot
    end(places, long)
    short = run(places, sequence("short", [*PREFIX, 2]))
    assert places.place_of(short).copied_from == (kept, len(PREFIX))
    assert found(places, sequence("next turn", [*PREFIX, *[1] * 51])) == len(PREFIX) + 48


def test_a_known_prompt_is_computed_in_its_last_token_only() -> None:
    """Logits are wanted, so something must be computed; a page that is shared could not be."""
    places = slots()
    end(places, run(places, sequence("a", PREFIX)))
    assert found(places, sequence("b", PREFIX)) == len(PREFIX) - 1


def test_what_a_step_copies_from_is_not_written_in_that_step() -> None:
    """A step may be tried again in parts, and the copies with it."""
    places = slots(3)
    long = run(places, sequence("long", [*PREFIX, *[1] * 50]))
    source = places.place_of(long).slot
    end(places, long)
    places.begin_step()
    reader = sequence("reader", [*PREFIX, 2])
    assert places.admit(reader)
    assert places.place_of(reader).copied_from == (source, len(PREFIX))
    assert places.admit(sequence("next", [5]))
    last = sequence("last", [6])
    assert not places.admit(last), "only the source is free"
    places.begin_step()
    assert places.admit(last)
    assert places.place_of(last).slot == source


def test_running_tokens_stay_within_the_capacity() -> None:
    places = slots(3, capacity=30)
    first = run(places, sequence("a", [1] * 20))
    assert not places.admit(sequence("b", [2] * 11))
    assert places.admit(sequence("c", [3] * 9))
    first.append(5)
    assert places.hold(first)
    first.append(5)
    assert not places.hold(first)


# Pages -----------------------------------------------------------------------------------------


def test_full_pages_are_shared_and_the_rest_is_ones_own() -> None:
    places = pages()
    first = run(places, sequence("a", [*PREFIX, 1]))
    second = run(places, sequence("b", [*PREFIX, 1]))
    ours, theirs = places.place_of(first).pages, places.place_of(second).pages
    assert ours[:5] == theirs[:5]
    assert ours[5] != theirs[5]


def test_a_page_comes_with_the_token_that_needs_it() -> None:
    places = pages()
    seq = run(places, sequence("a", [1] * BLOCK))
    assert len(places.place_of(seq).pages) == 1
    seq.append(1)
    assert places.hold(seq)
    assert len(places.place_of(seq).pages) == 2


def test_shared_pages_count_once() -> None:
    """Eight pages hold two sequences of six with five in common, and no third of two."""
    places = pages(8)
    run(places, sequence("a", [*PREFIX, 1]))
    run(places, sequence("b", [*PREFIX, 2]))
    assert not places.admit(sequence("c", [3] * (BLOCK + 1)))
    assert places.admit(sequence("d", [3]))


def test_the_end_of_a_prefix_is_forgotten_first() -> None:
    """Its beginning is what others can still use."""
    places = pages(6)
    end(places, run(places, sequence("a", [*PREFIX, 1])))
    end(places, run(places, sequence("b", [2] * 2 * BLOCK)))
    assert found(places, sequence("c", [*PREFIX, 1])) == 4 * BLOCK


def test_names_grow_with_the_sequence() -> None:
    seq = sequence("a", PREFIX)
    before = list(digests(seq, BLOCK))
    for _ in range(BLOCK):
        seq.append(1)
    assert digests(seq, BLOCK)[:-1] == before
    assert digests(seq, BLOCK) == digests(sequence("b", [*PREFIX, 1, 1, 1, 1]), BLOCK)


@pytest.mark.parametrize("places", [slots(2, 24), pages(7)], ids=["slots", "pages"])
def test_what_is_lent_is_back_with_the_next_step(places: Places) -> None:
    """And what a sequence has meanwhile come to need is its own."""
    one = run(places, sequence("one", PREFIX[:14]))
    two = run(places, sequence("two", PREFIX[14:]))
    assert places.lend(one, 4)
    assert not places.lend(two, 20)
    places.begin_step()
    one.tokens += [90] * 3
    assert places.hold(one)
    three = sequence("three", [91])
    assert places.hold(two)
    end(places, two)
    places.begin_step()
    assert places.admit(three)
    assert not places.lend(one, 8)


@pytest.mark.parametrize("places", [slots(2, 12), pages(3)], ids=["slots", "pages"])
def test_nobody_comes_in_on_what_is_lent(places: Places) -> None:
    """Who gives way is let in behind those whose guesses the step has room for already."""
    one = run(places, sequence("one", [90] * 7))
    two = sequence("two", [91] * 2)
    places.begin_step()
    assert places.lend(one, 4)
    assert not places.admit(two)
    places.begin_step()
    assert places.admit(two)


def test_nobody_waits_for_a_prefix_of_who_gives_way(places: Places) -> None:
    """That one may be paused for as long as he is there himself."""
    prompt = [70 + number % 7 for number in range(16 * BLOCK)]
    behind = sequence("behind", prompt)
    behind.rank = 2
    first, second = sequence("first", prompt), sequence("second", [*prompt, 1])
    places.begin_step()
    assert places.admit(behind)
    assert places.admit(first)
    assert not places.admit(second)
