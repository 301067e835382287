"""To and from Hugging Face, each conversion proving itself; generation; the model card."""
