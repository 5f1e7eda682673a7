"""Parts of `slimdiff.heal`: what the dense denoiser did, and how the slim one learns from it."""
