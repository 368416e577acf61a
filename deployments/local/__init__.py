"""The service on one machine, and the commands that run it, ask it and talk to it."""
