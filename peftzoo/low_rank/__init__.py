"""What the methods of the LoRA family share: the adapter with two thin factors, and its starts."""
