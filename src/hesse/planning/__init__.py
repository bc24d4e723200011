"""Which method answers a question, and what it will take."""
