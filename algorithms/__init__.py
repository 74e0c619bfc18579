"""The algorithm objects, written once in torch; they know neither toys nor Stable Diffusion."""
