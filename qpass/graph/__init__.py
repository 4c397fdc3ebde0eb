"""FX graphs and nothing of quantization: edits, constants, text, records, verification."""
