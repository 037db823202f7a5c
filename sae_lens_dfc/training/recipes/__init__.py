"""Named training settings: the papers' runs and public model organisms."""
