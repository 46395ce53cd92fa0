"""The forms of requests and answers that a server may speak, one a file."""
