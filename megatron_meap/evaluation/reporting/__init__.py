"""From lm-eval's results to estimates, comparisons, pictures and one HTML page."""
