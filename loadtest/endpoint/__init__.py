"""The server under test: its HTTP, its streams, and what is learnt of it first."""
