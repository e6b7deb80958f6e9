"""From weights to a network definition: the layer list, the blocks and the builder."""
