"""Search the model of the protocol by hand.

python -m tests.model              the deep search: all that the tests check, then any three
                                   faults, events and tokens; about eight minutes, half a GB
python -m tests.model RULE…        the shortest way into trouble without each of these rules
python -m tests.model rules        the same for every rule
"""

import sys

from tests.model.scenarios import KEPT, KEPT_DEEP, RULES_NEEDED, without
from tests.model.search import search


def main(names: list[str]) -> int:
    if names:
        for rule in RULES_NEEDED if names == ["rules"] else names:
            _say(f"Without {rule}: {search(without(rule)).found}\n")
        return 0
    broken = 0
    for name, scenario in (KEPT | KEPT_DEEP).items():
        result = search(scenario)
        verdict = "kept" if result.found is None else str(result.found)
        _say(f"{result.num_states:9,} states {result.cpu_s:6.1f} s  {name}: {verdict}")
        broken += result.found is not None
    return min(broken, 1)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
