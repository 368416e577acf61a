"""Peers that SinkServe is measured against, each driven in a process of its own."""
