"""What a walk backwards carries: terms, their sum, and reading them where parameters enter."""
