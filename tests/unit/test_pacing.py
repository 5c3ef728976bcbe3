"""How much of a prompt a step carries, on machines whose steps take what the test says."""

import random

import pytest

from workers.engine.pacing import Pace


class Machine:
    """A step takes ``decode_s`` and ``token_s`` per prompt token."""

    def __init__(self, decode_s: float, token_s: float) -> None:
        self.decode_s, self.token_s = decode_s, token_s

    def step_s(self, num_prefill_tokens: int) -> float:
        return self.decode_s + self.token_s * num_prefill_tokens

    def run(self, pace: Pace, num_steps: int, *, num_decoding: int = 8) -> list[int]:
        """Steps with as much of prompts as is allowed; every fourth has none."""
        carried: list[int] = []
        for step in range(num_steps):
            tokens = 0 if step % 4 == 3 else pace.prefill_tokens(num_decoding, 1)
            carried.append(tokens)
            pace.note(num_decoding, tokens, self.step_s(tokens))
        return carried


MACHINES = [
    Machine(0.020, 0.00015),  # fast matrix units
    Machine(0.025, 0.0006),
    Machine(0.050, 0.003),
]


def test_a_prompt_alone_has_the_whole_step() -> None:
    pace = Pace(512)
    Machine(0.025, 0.0006).run(pace, 50)
    assert pace.prefill_tokens(0, 1) == 512


def test_what_decoding_takes_is_looked_at_first() -> None:
    """One step without prompts, then all that is allowed: what a prompt token adds is not known."""
    pace = Pace(512)
    pace.note(0, 512, 0.1)
    assert pace.prefill_tokens(8, 1) == 0
    pace.note(8, 0, 0.02)
    assert pace.prefill_tokens(8, 1) == 92
    fresh = Pace(512)
    fresh.note(8, 0, 0.02)
    assert fresh.prefill_tokens(8, 1) == 504


@pytest.mark.parametrize("machine", MACHINES)
def test_mixed_steps_take_about_twice_as_long(machine: Machine) -> None:
    """Or carry all that is allowed, or the least that prompts need to go on."""
    pace = Pace(512)
    machine.run(pace, 200)
    tokens = pace.prefill_tokens(8, 1)
    ratio = machine.step_s(tokens) / machine.decode_s
    assert 1.6 < ratio < 2.2 or tokens in (16, 504)


def test_it_follows_when_the_machine_becomes_slower() -> None:
    """Another process on the same cores, or much longer contexts."""
    pace = Pace(512)
    MACHINES[0].run(pace, 100)
    before = pace.prefill_tokens(8, 1)
    MACHINES[1].run(pace, 200)
    assert pace.prefill_tokens(8, 1) < before / 2


def test_it_follows_when_more_rows_decode_and_prompts_never_end() -> None:
    """Then no step without a prompt says what decoding alone takes."""
    pace = Pace(512)
    Machine(0.010, 0.00015).run(pace, 100)
    busy = Machine(0.020, 0.00015)
    for _ in range(300):
        tokens = pace.prefill_tokens(32, 1)
        pace.note(32, tokens, busy.step_s(tokens))
    ratio = busy.step_s(pace.prefill_tokens(32, 1)) / busy.decode_s
    assert 1.3 < ratio < 3.0


def test_a_burst_does_not_wait_for_the_few_who_were_first() -> None:
    """The more start and the fewer decode, the more of a step is theirs; a few are no burst."""
    pace = Pace(512)
    MACHINES[1].run(pace, 200)
    usual = pace.prefill_tokens(8, 1)
    assert pace.prefill_tokens(1, 4) == usual
    assert pace.prefill_tokens(8, 8) == usual
    assert pace.prefill_tokens(16, 20) == pytest.approx(2 * usual, abs=1)
    assert pace.prefill_tokens(1, 31) == pytest.approx(4 * usual, abs=3)


def test_a_hiccup_changes_little() -> None:
    """One step of a hundred times the time, as when the machine sleeps."""
    pace = Pace(512)
    machine = MACHINES[1]
    machine.run(pace, 100)
    before = pace.prefill_tokens(8, 1)
    pace.note(8, 0, 100 * machine.decode_s)
    assert before <= pace.prefill_tokens(8, 1) < 1.7 * before
    machine.run(pace, 160)
    assert pace.prefill_tokens(8, 1) == pytest.approx(before, rel=0.15)


def test_prompts_always_go_on() -> None:
    """Whatever the durations: a few tokens at least, but for a look now and then."""
    draw = random.Random(5)
    pace = Pace(512)
    was_look = False
    for _ in range(2000):
        tokens = pace.prefill_tokens(8, 1)
        assert 16 <= tokens <= 504 or (tokens == 0 and not was_look)
        was_look = tokens == 0
        pace.note(8, tokens, draw.choice([0.0, 1e-6, 0.01, 3.0]))


def test_too_large_a_step_is_not_tried_again_at_once() -> None:
    """Half as much, then a token more per step up to what was allowed."""
    pace = Pace(64)
    pace.shrink()
    assert (pace.step_tokens, pace.prefill_tokens(0, 1)) == (32, 32)
    for _ in range(100):
        pace.note(8, 1, 0.01)
    assert pace.step_tokens == 64
    for _ in range(20):
        pace.shrink()
    assert pace.step_tokens == 1


def test_rows_leave_some_room_to_prompts() -> None:
    """When there are more rows than a step takes."""
    pace = Pace(24)
    assert pace.max_rows(is_alone=True) == 24
    assert pace.max_rows(is_alone=False) == 12
    assert Pace(512).max_rows(is_alone=False) == 496


def learnt(draft_s: float, num_decoding: int, decode_s: float = 0.01) -> Pace:
    """Of steps of ``num_decoding`` rows with four guesses, all right, and looks between them."""
    pace = Pace(512)
    for _ in range(20):
        pace.note(num_decoding, 0, decode_s)
        pace.note(num_decoding, 0, decode_s + 4 * draft_s, num_draft_tokens=4)
        pace.credit(4)
    return pace


def test_a_guess_costs_what_it_adds_by_measure() -> None:
    """Half a millisecond of ten: one in twenty that it is right, and some more to be on the safe
    side. Beside seven others the step makes so much of its time that it must be likelier."""
    alone, beside = learnt(0.0005, 1), learnt(0.0005, 8)
    assert alone.draft_price(1) == pytest.approx(0.075, rel=0.05)
    assert beside.draft_price(8) == pytest.approx(0.6, rel=0.05)


def test_a_step_that_computes_all_the_time_has_no_guesses() -> None:
    assert learnt(0.001, 16, decode_s=0.016).draft_price(16) == 1.0


def test_what_was_dear_is_tried_again() -> None:
    pace = learnt(0.02, 1)
    assert pace.draft_price(1) == 1.0
    for _ in range(700):
        pace.note(1, 0, 0.01)
    assert pace.draft_price(1) < 0.5


def guessed(pace: Pace, num_right: int, num_steps: int) -> float:
    """The price beside three others, after steps that take a tenth longer with four guesses."""
    for _ in range(num_steps):
        pace.note(4, 0, 0.01)
        pace.note(4, 0, 0.011, num_draft_tokens=4)
        pace.credit(num_right)
    return pace.draft_price(4)


def test_guesses_that_do_not_pay_must_promise_more() -> None:
    """Whatever they were thought to cost: what a step brought is held against what it took."""
    usual = guessed(Pace(512), num_right=1, num_steps=40)
    dear = Pace(512)
    assert guessed(dear, num_right=0, num_steps=40) > 3 * usual
    for _ in range(700):
        dear.note(4, 0, 0.01)
    assert dear.draft_price(4) < usual


def test_guesses_that_pay_again_are_trusted_again() -> None:
    pace = Pace(512)
    distrusted = guessed(pace, num_right=0, num_steps=40)
    assert guessed(pace, num_right=3, num_steps=40) < distrusted / 3


def test_guesses_make_no_step_longer_than_prompts_may() -> None:
    assert learnt(0.0005, 4).draft_tokens(4) == pytest.approx(18, abs=1)
    assert learnt(0.0, 4).draft_tokens(4) == 508


def test_decoding_is_looked_at_beside_guesses_too() -> None:
    pace = learnt(0.0005, 1)
    for _ in range(15):
        assert pace.draft_tokens(1) > 0
        pace.note(1, 0, 0.012, num_draft_tokens=4)
    assert pace.draft_tokens(1) == 0
    assert Pace(512).draft_tokens(1) == 0
