"""``python -m pairdiff_core`` is the command ``pairdiff``, which lives beside the core."""

from pairdiff_cli.__main__ import main

if __name__ == "__main__":
    main()
