"""One file for each kind of figure: from arrays to a matplotlib Axes."""
