"""One file a method: ways to answer a question."""
