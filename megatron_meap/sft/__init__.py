"""Fine-tuning with MEAP: from conversations in JSON lines to packed samples on Megatron's trainer."""
