"""How far tracked inverses and log-determinants are off."""
