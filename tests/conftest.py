"""Settings for all tests."""

from __future__ import annotations

import torch
from hypothesis import settings

# No deadlines: how long an example takes says more about what else the machine is doing.
settings.register_profile("iddpm", deadline=None)
settings.load_profile("iddpm")

# Tiny networks: more threads only wait for each other.
torch.set_num_threads(1)
