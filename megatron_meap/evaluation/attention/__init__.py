"""Where one or two models attend: the paper's measures, with pictures."""
