"""``python -m yolotrt``."""

from typing import NoReturn

from yolotrt.cli import main
from yolotrt.shell import end_process


def run() -> NoReturn:
    """Run the command line and end the process."""
    end_process(main())


if __name__ == "__main__":
    run()
