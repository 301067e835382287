"""Tokenizers: the mask token, encoders, the reference they must equal, Hugging Face directories, fingerprints."""
