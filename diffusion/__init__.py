"""The diffusion maths and the networks. Imports nothing else of this project."""
