"""Trains, scores and judges one candidate."""
