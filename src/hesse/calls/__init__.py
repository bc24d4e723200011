"""What is known of a call: one table, and a rule for each kind."""
