"""Runtime: an engine directory becomes tokens (window, slots, scheduler, executors)."""
