"""Bytes to images, and images to patches."""
