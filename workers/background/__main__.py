"""``python -m workers.background``: one background process, set up by ``HEADRACE_…`` variables."""

import sys

from pydantic import ValidationError

from common.settings import BackgroundSettings, first_error
from workers import exit_codes
from workers.background.process import run


def main() -> int:
    try:
        settings = BackgroundSettings()
    except ValidationError as error:
        sys.stderr.write(f"headrace background: {first_error(error)}\n")
        return exit_codes.USAGE
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
