"""The decoder in C: one source, compiled at first use, for CPUs whose compiler can be found."""
