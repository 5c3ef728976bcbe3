"""From a request's grammar to the matcher that the engine follows: tried apart, then compiled here.

What compiles in a process that may be killed (:mod:`workers.grammar_trial`) is compiled once more
in a thread of this one, without the GIL. Neither the event loop nor the engine's thread waits.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from threading import Lock, get_native_id
from typing import TYPE_CHECKING

import msgspec

from common.failures import Failure
from common.logs import get_logger
from common.messages import Grammar
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from workers.engine.grammar import GrammarError, Matcher

if TYPE_CHECKING:
    from workers.guided import Vocabulary

log = get_logger()

_NICENESS = 10
"""Of trials and of compiling: a tenth of what a step gets, where both want the same processor."""
_NUM_TRIALS = 2
"""Trials at a time. One that takes all its time must not hold up those behind it."""
_WALL_TIMES = 5
"""Times its processor time that a trial may take: on a busy machine it gets what is left."""
_MAX_REMEMBERED = 128
"""Trials whose outcome is kept, refusals too; each as large as its source, about."""


class Grammars:
    """Makes matchers over the vocabulary of one model. Use from one event loop.

    ``load`` brings the tokenizer, with :meth:`warm_up` or when the first grammar comes.
    ``vocab_size`` is the model's, which may be more than the tokenizer has. ``max_bytes`` limits
    the source of a grammar, ``compile_s`` the processor time that it takes to compile.
    """

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        *,
        vocab_size: int,
        eos_token_ids: list[int],
        max_bytes: int,
        compile_s: float,
    ) -> None:
        self._load = load
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_bytes = max_bytes
        self._compile_s = compile_s
        self._trials: OrderedDict[Grammar, asyncio.Task[str | Failure]] = OrderedDict()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False
        self._lock = Lock()
        """Around the two above, for the threads of trials."""
        self._trial_threads = ThreadPoolExecutor(_NUM_TRIALS, "grammar-trial")
        self._compile_thread = ThreadPoolExecutor(1, "grammar", _be_nice)
        self._vocabulary: Vocabulary | None = None

    async def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of ``grammar``, for one generation.

        Each is compiled anew, which mostly takes a millisecond: copies of a compiled grammar share
        the limited states of its lexer, so what one generation may do would hang on the others.

        Raises:
            Failure: GRAMMAR_REJECTED, with the reason; DRAINING, once this is closed; others, where
                it could not be tried.
        """
        num_bytes = len(grammar.value.encode())
        if num_bytes > self._max_bytes:
            raise _rejected(f"it has {num_bytes} bytes, and {self._max_bytes} are allowed")
        definition = await asyncio.shield(self._trial_of(grammar))
        if isinstance(definition, Failure):
            raise definition
        self._check_open()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compile_thread, self._compile, definition)

    def warm_up(self) -> None:
        """Do now what the first grammar would else do: some 0.2 s, part of them with the GIL."""
        self._known_vocabulary()

    def close(self) -> None:
        """End what still runs."""
        with self._lock:
            self._is_closed = True
            for process in self._processes:
                process.kill()
        self._trial_threads.shutdown(wait=False, cancel_futures=True)
        self._compile_thread.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials.values():
            trial.cancel()

    def _trial_of(self, grammar: Grammar) -> "asyncio.Task[str | Failure]":
        """The one trial of ``grammar``, which may be over; several generations may wait for it."""
        trial = self._trials.get(grammar)
        if trial is None:
            trial = self._trials[grammar] = asyncio.create_task(self._try(grammar))
        self._trials.move_to_end(grammar)
        while len(self._trials) > _MAX_REMEMBERED:
            self._trials.popitem(last=False)
        return trial

    async def _try(self, grammar: Grammar) -> str | Failure:
        """Its definition for llguidance, or why it is refused."""
        loop = asyncio.get_running_loop()
        try:
            self._check_open()
            return await loop.run_in_executor(self._trial_threads, self._run_trial, grammar)
        except Failure as failure:
            if failure.code != "GRAMMAR_REJECTED":  # not its own fault: the next may try again
                self._trials.pop(grammar, None)
            return failure

    def _check_open(self) -> None:
        """Raises Failure DRAINING: closed threads take nothing any more."""
        if self._is_closed:
            raise Failure("DRAINING")

    # On threads of their own ---------------------------------------------------------------------

    def _run_trial(self, grammar: Grammar) -> str:
        """Raises Failure."""
        if find_spec("llguidance") is None:  # a simulated worker needs little else
            raise Failure("UNSUPPORTED_PARAMETER", "This worker has no llguidance for grammars.")
        command = (sys.executable, "-m", "workers.grammar_trial", str(self._compile_s))
        try:
            process = self._start(command)
        except OSError as error:
            log.error("grammar.trial_failed", reason=str(error))  # noqa: TRY400 - it says all
            raise Failure("INTERNAL", "The grammar could not be checked.") from error
        with process:
            try:
                answer, _ = process.communicate(
                    msgspec.msgpack.encode(grammar), timeout=self._compile_s * _WALL_TIMES
                )
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise _rejected(f"compiling it took over {self._compile_s} s") from error
            finally:
                with self._lock:
                    self._processes.discard(process)
        if process.returncode != 0:
            raise self._failure_of(process.returncode)
        definition, refusal = msgspec.msgpack.decode(answer, type=tuple[str, str])
        if refusal:
            raise _rejected(refusal)
        return definition

    def _start(self, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
        with self._lock:
            self._check_open()
            process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._processes.add(process)
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)  # from its first import on
        return process

    def _failure_of(self, returncode: int) -> Failure:
        if self._is_closed:
            return Failure("DRAINING")
        match -returncode:
            case signal.SIGPROF:
                return _rejected(f"compiling it took over {self._compile_s} s")
            case signal.SIGSEGV | signal.SIGBUS:
                return _rejected("it is nested too deeply")
            case _:
                return _rejected("compiling it took too much memory")

    def _compile(self, definition: str) -> Matcher:
        """Raises Failure."""
        try:
            return self._known_vocabulary().matcher(definition)
        except GrammarError as error:
            raise Failure("GRAMMAR_REJECTED", str(error)) from error

    def _known_vocabulary(self) -> "Vocabulary":
        if self._vocabulary is None:
            from workers.guided import Vocabulary  # a simulated worker may lack llguidance

            self._vocabulary = Vocabulary(self._load(), self._vocab_size, self._eos_token_ids)
        return self._vocabulary


def build_grammars(settings: WorkerSettings, *, vocab_size: int) -> Grammars:
    """For the model that ``settings`` name; blocks for a while, unless the engine is simulated."""
    stored = ModelStore(settings.data_dir).get(settings.model)
    grammars = Grammars(
        partial(Tokenizer.load, stored.path),
        vocab_size=vocab_size,
        eos_token_ids=stored.manifest.eos_token_ids,
        max_bytes=settings.grammar_max_bytes,
        compile_s=settings.grammar_compile_s,
    )
    if settings.engine == "torch":
        with suppress(GrammarError):  # each request for one will be told
            grammars.warm_up()
    return grammars


def _be_nice() -> None:
    """The compiling thread; elsewhere than on Linux a thread has no priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICENESS)


def _rejected(reason: str) -> Failure:
    return Failure("GRAMMAR_REJECTED", f"grammar is not valid: {reason}")  # TGI's words
