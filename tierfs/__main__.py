"""The command's first lines: `tierfs`, or `python -m tierfs`."""

import sys


def main() -> None:
    """Entry point of the command. Always ends by SystemExit."""
    try:
        from tierfs import cli
    except KeyboardInterrupt:  # at once, while the rest is imported
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
