"""One short file a question: arguments in, answer out."""
