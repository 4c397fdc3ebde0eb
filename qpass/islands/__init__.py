"""Islands: operations with quantizable operands, the q/dq pairs around them, and what only moves values."""
