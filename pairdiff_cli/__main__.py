"""``python -m pairdiff_core`` is the command ``pairdiff``."""

import sys


def main() -> None:
    """Run the command; Ctrl-C ends it with one line at any time, even while PyTorch is imported."""
    try:
        from pairdiff_cli import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit("pairdiff: interrupted")


if __name__ == "__main__":
    main()
