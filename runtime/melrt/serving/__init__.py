"""Voices past one process: bulk synthesis, here and on a Ray cluster. Nothing of it is imported by `import melrt`."""
