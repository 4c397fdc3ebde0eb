"""What the other rooms compare, measure and show: plain values that hold no graph and no weight."""
