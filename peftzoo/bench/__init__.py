"""Benchmarks: one adapted layer and one training step, ours beside peft's and other tools', over the frozen floor."""
