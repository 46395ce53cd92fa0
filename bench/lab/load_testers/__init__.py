"""Load testers beside each other: what each says of one mock server whose own log is the truth, and what it costs."""
