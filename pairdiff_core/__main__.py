"""``python -m pairdiff_core`` is the command ``pairdiff``."""

from pairdiff_core.cli import main

if __name__ == "__main__":
    main()
