"""How long things take, beside other libraries."""
