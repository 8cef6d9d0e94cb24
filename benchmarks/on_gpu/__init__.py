"""The parts of `gpu.py`: what is measured on a GPU, how it is checked, and how it is shown."""
