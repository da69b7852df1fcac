"""Models of grey images: diffusion with Gaussian noise, control, a one-step student, modalities, missing data."""
