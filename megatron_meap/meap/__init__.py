"""The method: which inputs are masked, the dataset that masks them, its settings, its losses. No Megatron here."""
