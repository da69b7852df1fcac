"""``python -m pairdiff_core`` is the command ``pairdiff``."""

import sys


def main() -> None:
    """Run the command; Ctrl-C ends it with a one-line message at any time, even while PyTorch is being imported."""
    try:
        from pairdiff_cli import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit("pairdiff: interrupted")


if __name__ == "__main__":
    main()
