"""Ways to code a KV cache, judged on models before anybody writes a kernel."""
