"""`torch.distributed`'s collectives over coded payloads, called outside of graphs."""
