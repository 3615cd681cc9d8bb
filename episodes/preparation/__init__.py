"""Prepares raw videos for training: decoded, packed and checked."""
