"""A small real network beside the simulation of the same scenario: is the simulation right?"""
