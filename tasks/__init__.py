"""What the chain is made of: one module per stage, and the tasks around them."""
