"""Validation: do the neurons that a method names really matter to their language, and to no other?"""
