"""Hydra presets of moefactory, installed as ``moefactory.conf`` (this file makes ``pkg://moefactory.conf`` work)."""
