"""The core: diffusion maths, networks and the checkpoint format. Imports nothing else of this project."""
