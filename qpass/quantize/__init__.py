"""From a captured graph to a prepared one, a quantized one and a lowered one."""
