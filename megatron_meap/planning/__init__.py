"""What a run will need, known before it is queued: parameters, memory, FLOPs, time, and which layouts fit.

One process on any machine looks at every rank: process groups are pretended (`world`), models are built and run on
tensors that have a shape and no memory (`trace`), and what Megatron keeps for each is added up (`memory`).
"""
