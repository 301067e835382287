"""A study: a grid of training runs, resumed where they stopped, compared seed by seed, made into a page."""
