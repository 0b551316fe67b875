"""Other properties than invertibility (Section 5): orthogonal and Lipschitz continuous layers, and plain ones."""
