"""Deciding: sites, plans, and the schedule that turns options into numbers."""
