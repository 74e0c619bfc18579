"""1-D and 2-D chains, data and rewards with exact answers to compare with."""
