"""``python -m pairdiff_core`` is the command ``pairdiff``, which is in ``pairdiff_cli``."""

from pairdiff_cli.__main__ import main

if __name__ == "__main__":
    main()
