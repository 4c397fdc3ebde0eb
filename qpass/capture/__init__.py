"""A model as qpass IR: by ``torch.export``, from Dynamo, for training; and why it cannot be captured."""
