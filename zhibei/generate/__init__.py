"""Sampling from a model: used by training's samples, RL, chat, server and evaluation. Knows no stage."""
