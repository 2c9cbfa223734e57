"""Methods of the papers that stand beside LEAP's agent: one module each, all ending in the same Plan."""
