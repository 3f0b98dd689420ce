"""Model names to verified folders, and folders to parameters."""
