"""The row kernels of the fast forms, and the products around them."""
