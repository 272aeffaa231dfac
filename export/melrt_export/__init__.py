"""The training side of melrt: reads checkpoints, builds and checks what the runtime executes. Only this package imports torch."""
