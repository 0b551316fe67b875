"""The experiments of the paper, beside the paper's claims."""
