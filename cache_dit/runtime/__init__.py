"""What happens at every call: the clock, the decision, the buffers, the statistics. The only mutable state lies here."""
