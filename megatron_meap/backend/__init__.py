"""What Megatron runs on: the device, the CPU adaptation, local layers, patches of Megatron."""
