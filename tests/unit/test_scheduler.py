"""Who computes what in a step."""

from collections.abc import Callable
from collections.abc import Sequence as Rows

from common.models.tokenizer import Tokenizer
from tests.support.engines import request
from tests.support.tiny_model import build_tokenizer
from workers.engine.places import SlotPlaces
from workers.engine.scheduler import Chunk, Limits
from workers.engine.scheduler import Scheduler as PlacedScheduler
from workers.engine.sequence import Sequence, TextRules

RULES = TextRules(Tokenizer(build_tokenizer(), {}), frozenset())
ROOMY = Limits(max_sequences=4, cache_tokens=1000, step_tokens=100)
LETTER = 70


def Scheduler(limits: Limits) -> PlacedScheduler:  # noqa: N802
    return PlacedScheduler(limits, SlotPlaces(limits.max_sequences, limits.cache_tokens))


def sequence(id: str, num_prompt: int, max_new_tokens: int = 50) -> Sequence:
    return Sequence(request(id, [LETTER] * num_prompt, max_new_tokens=max_new_tokens), RULES)


def step(
    scheduler: PlacedScheduler, took_s: Callable[[list[Chunk]], float] = lambda _: 0.0
) -> list[Chunk]:
    """Plan a step and let it happen: every closed gap brings a token."""
    chunks = scheduler.plan()
    closed = [chunk.sequence for chunk in chunks if chunk.samples]
    scheduler.complete(chunks, took_s(chunks))
    for seq in closed:
        seq.append(LETTER)
    return chunks


def shape(chunks: Rows[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.count) for chunk in chunks]


def test_a_prompt_longer_than_the_budget_is_cut_into_chunks() -> None:
    scheduler = Scheduler(Limits(max_sequences=4, cache_tokens=1000, step_tokens=4))
    scheduler.add(sequence("a", 10))
    got = [shape(step(scheduler)) for _ in range(4)]
    assert got == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)], [("a", 10, 1)]]


def test_decode_rows_come_before_chunks_of_prompts() -> None:
    """A long prompt never makes those wait that are answering already."""
    scheduler = Scheduler(Limits(max_sequences=4, cache_tokens=1000, step_tokens=4))
    scheduler.add(sequence("a", 2))
    step(scheduler)
    step(scheduler)
    scheduler.add(sequence("b", 9))
    assert shape(step(scheduler)) == [("a", 3, 1), ("b", 0, 3)]
    assert shape(step(scheduler)) == [("a", 4, 1), ("b", 3, 3)]


def test_a_prompt_beside_decode_rows_is_cut_to_what_they_can_bear() -> None:
    """A step takes 10 ms, and half of one for each token of a prompt: 22 ms are borne."""
    scheduler = Scheduler(Limits(max_sequences=4, cache_tokens=1000, step_tokens=100))

    def took_s(chunks: list[Chunk]) -> float:
        return 0.010 + 0.0005 * sum(chunk.count for chunk in chunks if chunk.count > 1)

    scheduler.add(sequence("a", 60))
    for _ in range(10):
        step(scheduler, took_s)
    scheduler.add(sequence("b", 400))
    carried = [[chunk.count for chunk in step(scheduler, took_s)] for _ in range(10)]
    assert all(rows == 1 and 16 <= prompt <= 25 for rows, prompt in carried)


def test_one_prompt_is_finished_before_the_next_begins() -> None:
    scheduler = Scheduler(Limits(max_sequences=4, cache_tokens=1000, step_tokens=4))
    scheduler.add(sequence("a", 6))
    scheduler.add(sequence("b", 6))
    assert shape(step(scheduler)) == [("a", 0, 4)]
    assert shape(step(scheduler)) == [("a", 4, 2), ("b", 0, 2)]


def test_a_budget_below_the_number_of_rows_is_shared_in_turn() -> None:
    scheduler = Scheduler(Limits(max_sequences=3, cache_tokens=1000, step_tokens=2))
    for id in "abc":
        scheduler.add(sequence(id, 1))
    served = [chunk.sequence.id for _ in range(3) for chunk in step(scheduler)]
    assert sorted(served) == ["a", "a", "b", "b", "c", "c"]


def test_who_finds_no_slot_waits_and_gets_the_next_free_one() -> None:
    scheduler = Scheduler(Limits(max_sequences=1, cache_tokens=1000, step_tokens=100))
    first, second = sequence("a", 2), sequence("b", 2)
    scheduler.add(first)
    scheduler.add(second)
    assert shape(step(scheduler)) == [("a", 0, 2)]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.remove(first)
    assert shape(step(scheduler)) == [("b", 0, 2)]


def test_a_large_one_at_the_head_is_not_overtaken() -> None:
    scheduler = Scheduler(Limits(max_sequences=4, cache_tokens=20, step_tokens=100))
    first = sequence("a", 10)
    for seq in (first, sequence("large", 15), sequence("small", 2)):
        scheduler.add(seq)
    assert shape(step(scheduler)) == [("a", 0, 10)]
    scheduler.remove(first)
    assert shape(step(scheduler)) == [("large", 0, 15), ("small", 0, 2)]


def test_the_youngest_gives_way_when_the_cache_is_full() -> None:
    """It returns with its tokens, from the beginning, once another one has ended."""
    scheduler = Scheduler(Limits(max_sequences=4, cache_tokens=12, step_tokens=100))
    first, second = sequence("a", 5), sequence("b", 5)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    assert shape(step(scheduler)) == [("a", 5, 1), ("b", 5, 1)]
    assert shape(step(scheduler)) == [("a", 6, 1)]
    assert (second.num_computed, second.num_generated, scheduler.num_waiting) == (0, 2, 1)
    assert shape(step(scheduler)) == [("a", 7, 1)], "not back while nothing has ended"
    scheduler.remove(first)
    assert shape(step(scheduler)) == [("b", 0, 7)]


def test_the_promise_counts_what_waits_and_what_runs() -> None:
    scheduler = Scheduler(Limits(max_sequences=1, cache_tokens=1000, step_tokens=100))
    first = sequence("a", 10, max_new_tokens=20)
    scheduler.add(first)
    scheduler.add(sequence("b", 1, max_new_tokens=5))
    step(scheduler)
    assert scheduler.promised_tokens == 36
    scheduler.remove(first)
    assert scheduler.promised_tokens == 6


def test_freed_slots_are_used_again_lowest_first() -> None:
    """That memory has been touched already."""
    scheduler = Scheduler(ROOMY)
    first, second = sequence("a", 1), sequence("b", 1)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    scheduler.remove(first)
    scheduler.add(sequence("c", 1))
    assert {chunk.sequence.id: chunk.slot for chunk in step(scheduler)} == {"b": 1, "c": 0}


def drafting(**limits: int) -> PlacedScheduler:
    chosen = {"max_sequences": 4, "cache_tokens": 1000, "step_tokens": 100, "draft_tokens": 5}
    return Scheduler(Limits(**(chosen | limits)))


def test_guesses_stand_behind_what_is_known() -> None:
    scheduler = drafting()
    scheduler.add(sequence("a", 10))
    step(scheduler)
    step(scheduler)  # how long it takes without any is looked at first
    (chunk,) = step(scheduler)
    assert (chunk.start, chunk.count, chunk.known_end) == (11, 6, 12)
    assert chunk.tokens == [LETTER] * 6
    (chunk,) = scheduler.plan()
    assert chunk.start == 12, "a guess counts only when it was chosen"


def test_a_step_with_prompts_has_no_guesses() -> None:
    scheduler = drafting()
    scheduler.add(sequence("a", 10))
    for _ in range(4):
        step(scheduler)
    scheduler.add(sequence("b", 10))
    assert shape(step(scheduler)) == [("a", 13, 1), ("b", 0, 10)]


def test_no_guess_goes_beyond_the_end() -> None:
    """The last token of all is never guessed: nobody would ask what comes behind it."""
    scheduler = drafting()
    scheduler.add(sequence("a", 10, max_new_tokens=5))
    counts = [len(step(scheduler)[0].draft) for _ in range(5)]
    assert counts == [0, 0, 2, 1, 0]


def test_no_one_is_put_back_for_a_guess() -> None:
    scheduler = drafting(cache_tokens=33)
    scheduler.add(sequence("a", 10, max_new_tokens=15))
    scheduler.add(sequence("b", 10, max_new_tokens=15))
    for _ in range(3):
        step(scheduler)
    drafts = [[len(chunk.draft) for chunk in step(scheduler)] for _ in range(3)]
    assert drafts == [[5, 0], [5, 0], [0, 0]]
    assert scheduler.num_running == 2
