"""Tries one grammar in a process of its own, which may be killed: what compiles here compiles.

A schema or an expression of a few hundred bytes can take minutes to compile, gigabytes, or more of
the stack than there is. None of that may happen to a worker. The grammar comes on standard input;
on standard output goes its translation for llguidance, or why it was refused. Anything else that
ends this process is a refusal, too.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import llguidance
import msgspec
from llguidance.gbnf_to_lark import any_to_lark

from common.messages import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

STACK_BYTES = 1024 * 1024
"""Of the thread that compiles: less than any thread of a worker has."""
MAX_MEMORY_BYTES = 96 * 1024 * 1024
"""What compiling may add. Each generation has a compiled grammar of its own, so this is also what
each may add to a worker."""
LIMITS = llguidance.LLParserLimits(
    # llguidance gives up above these. One token's mask then takes 8 ms at most, less than a step,
    # where its own defaults let it take 500; 280 tools, or as many optional fields, are allowed.
    max_items_in_row=1000,
    step_max_items=2000,
    step_lexer_fuel=100_000,
    # A few per token: enough for an answer of 10,000. They take about 300 bytes each.
    max_lexer_states=50_000,
    # Would compute ahead, for the whole vocabulary, what most answers never need.
    precompute_large_lexemes=False,
    # Otherwise messages quote the answer so far.
    verbose_errors=False,
)
_QUICK_S = 0.1
"""Processor time of compiling in which all is done that people use: 60 tools take 0.04 s."""
_JSON_RULES: "JsonCompileOptions" = {
    # Some between any two tokens of JSON, but not without an end: weak models loop in it.
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n\t\r]{1,64}",
    # A keyword that cannot be kept is refused, not ignored.
    "lenient": False,
    "coerce_one_of": False,
}


def translate(grammar: Grammar) -> str:
    """The definition of ``grammar`` in llguidance's own form, mostly unchecked.

    Raises:
        Exception: of any kind, with a text; the library's are not documented.
    """
    match grammar.kind:
        case "json_schema":
            schema = json.loads(grammar.value)
            if not isinstance(schema, dict):
                raise TypeError("a JSON schema is an object")
            source = grammar.value if schema else '{"type": "object"}'
            return llguidance.LLMatcher.grammar_from_json_schema(source, overrides=_JSON_RULES)
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.value)
        case "ebnf":
            return llguidance.LLMatcher.grammar_from_lark(any_to_lark(grammar.value))


def explain(error: str) -> str:
    """What of the library's report a client should read: the line that says what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no reason given"]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (named or lines)[0][:300]
    if reason.startswith("NoExtension"):
        return "nothing matches it"
    if reason.startswith(("lexer error", "parser error", "Parser Error: Current row")):
        return f"it needs too much work for one token ({reason.partition(': ')[2]})"
    return reason


def attempt(grammar: Grammar) -> tuple[str, str]:
    """Its definition for llguidance, and why it is refused; one of them is empty."""
    try:
        definition = translate(grammar)
    except RecursionError:
        return "", "it is nested too deeply"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is said of this grammar
        return "", explain(str(error))
    # Bytes stand in for the model's tokens: what depends on those is bounded by LIMITS.
    tokenizer = llguidance.LLTokenizer("byte")
    compiled = llguidance.LLMatcher(tokenizer, definition, log_level=0, limits=LIMITS)
    compiled.compute_bitmask()
    return ("", explain(compiled.get_error())) if compiled.is_error() else (definition, "")


def _limit(processor_s: float) -> None:
    """From here on: so much processor time and memory, then the kernel ends this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, processor_s)


def _wait_politely(compiling: threading.Thread) -> None:
    """Wait for it; if it is not quick, it goes on only where nothing else wants a processor.

    Beside that a step of the engine takes its usual time. But a busy machine might then leave it
    nothing at all for seconds, so that what is quick, and most is, keeps its low share.
    """
    slow_at_s = time.process_time() + _QUICK_S
    while time.process_time() < slow_at_s and compiling.is_alive():
        compiling.join(_QUICK_S / 5)
    if sys.platform == "linux" and compiling.is_alive() and compiling.native_id is not None:
        with suppress(ProcessLookupError):  # it is over now
            os.sched_setscheduler(compiling.native_id, os.SCHED_IDLE, os.sched_param(0))
    compiling.join()


def main() -> None:
    """``python -m workers.grammar_trial SECONDS``: so much processor time it may take."""
    grammar = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Grammar)
    answers: list[tuple[str, str]] = []
    threading.stack_size(STACK_BYTES)
    _limit(float(sys.argv[1]))
    thread = threading.Thread(target=lambda: answers.append(attempt(grammar)))
    thread.start()
    _wait_politely(thread)
    sys.stdout.buffer.write(msgspec.msgpack.encode(answers[0]))


if __name__ == "__main__":
    main()
