"""``python -m workers``: one worker process, set up by ``HEADRACE_…`` variables."""

import sys

from pydantic import ValidationError

from common.settings import WorkerSettings, first_error
from workers import exit_codes
from workers.worker import run


def main() -> int:
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        sys.stderr.write(f"headrace worker: {first_error(error)}\n")
        return exit_codes.USAGE
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
