"""FX graphs and nothing of quantization: edits, constants, regions, patterns and rules, passes and their pipeline."""
