"""What every call needs whatever the method: memory, chunks, batches, progress, isolation."""
