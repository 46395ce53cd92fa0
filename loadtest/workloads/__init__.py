"""What is asked: prompts, their lengths and the bodies of requests."""
