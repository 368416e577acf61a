"""Control plane: who owns which conversation, what is durable, how to restore it."""
