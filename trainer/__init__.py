"""From labelled images to a checkpoint. Knows the core and nothing of export or service."""
