"""Reinforcement learning beside the losses: rollouts, rewards, advantages."""
