"""What the TensorRT backends need of a GPU: its memory, its streams, and a table that runs there.

Nothing here imports a library of NVIDIA at the top of a module.
"""
