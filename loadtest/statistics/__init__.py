"""What a sample of dependent requests says: figures with their intervals, the steady part, and changes between runs."""
