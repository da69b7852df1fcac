"""The command ``pairdiff``: its options, what each command does, and the files it reads and writes.

Nothing is imported here, so that ``python -m pairdiff_core`` answers Ctrl-C from its first moment on.
"""
