"""Which law a sampler has, and how fast it forgets its start."""
