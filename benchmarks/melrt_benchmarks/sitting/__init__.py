"""One sitting at a GPU: every check and measurement that needs one, each in a process of its own, within a time budget."""
