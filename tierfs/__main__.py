"""The command's first lines: `tierfs`, or `python -m tierfs`."""

import gc
import sys


def main() -> None:
    """Entry point of the command. Always ends by SystemExit."""
    gc.disable()  # until all is imported (cli.py): to look for garbage in what stays is a fifth of the start
    try:
        from tierfs import cli
    except KeyboardInterrupt:  # at once, while the rest is imported
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
