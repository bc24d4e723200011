"""What every call needs whatever the method: memory, chunks, progress, isolation."""
