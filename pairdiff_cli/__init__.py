"""The command ``pairdiff``: its options, what each command does, and the files it reads and writes.

This file imports nothing, so that ``python -m pairdiff_core`` handles Ctrl-C from the start.
"""
