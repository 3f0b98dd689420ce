"""The network: configuration, vision tower, projector, decoder; and the plain reference generation."""
