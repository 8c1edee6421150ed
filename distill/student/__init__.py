"""The student of the paper (arXiv 2509.21318), stage by stage: trajectory guidance, distribution matching, split timesteps."""
