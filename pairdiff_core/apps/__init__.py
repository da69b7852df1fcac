"""What people call: the command ``pairdiff``, its files of volumes and exported pairs, and publishing a model.

Nothing is imported here, so that ``python -m pairdiff_core`` answers Ctrl-C from its first moment on.
"""
