"""Full-scale chains and rewards: image diffusion models as `Chain`s, and the driving of audits and launches."""
