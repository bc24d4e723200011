"""What is known of the function: the calls that one evaluation of it made."""
