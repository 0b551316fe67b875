"""How a matrix, its inverse and its determinant are kept while low-rank updates change them."""
