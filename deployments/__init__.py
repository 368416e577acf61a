"""Ray Serve: HTTP and handles in, tokens out; the only room that wires the others together."""
