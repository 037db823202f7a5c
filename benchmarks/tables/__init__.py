"""Tables, plots and comparisons of benchmark results."""
